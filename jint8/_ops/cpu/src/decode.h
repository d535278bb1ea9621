// What a step of decoding does, of plain arrays: attention of one token of each row, a feed-forward network, and a whole
// layer of a decoder. All of it is float32.
#ifndef JINT8_DECODE_H_
#define JINT8_DECODE_H_

#include <algorithm>
#include <cstring>

#include "projection.h"

namespace jint8 {

// One token of `batch` rows, with `groups` queries to each of `heads` keys and values, of `size` features. Those of row
// b's head h lie `stride * (b * heads + h)` behind the first ones.
struct Attention {
  int64_t batch, heads, groups, size, length;
  const float* q;
  int64_t q_stride;
  const float* own_key;
  const float* own_value;
  int64_t own_stride;
  float* key;            // the cache, [batch, heads, size, length]
  float* value;          // [batch, heads, length, size]
  int64_t slot;          // of the token
  const int32_t* first;  // the slot of each row's first token, or nullptr for 0
  int64_t window;        // how many of the latest slots the token sees; 0: all
  ScoreChange change;    // with slopes of [heads, groups]
  float* out;            // [batch, heads, groups, size]
};

// The slot where `lax.dynamic_update_slice` writes: it moves what would end outside.
inline int64_t slot_within(int64_t slot, int64_t length) { return std::min(std::max<int64_t>(slot, 0), length - 1); }

// Where XLA gives the cache that is read and the one that is written different memory.
inline void copy_if_apart(const float* from, float* to, int64_t count) {
  if (from != to) std::memcpy(to, from, count * sizeof(float));
}

// Writes the token's key and value into its slot of the cache of `heads` number `i` of all rows, and computes
// out = softmax(q keys) values over the slots that it sees.
void attend_head(const Attention& attention, int64_t i, const Kernels& kernels);

// down(activation(up(x))), or down(activation(gate(x)) * up(x)) with `blocks` times some rows of the gate and then as
// many of the other factor in `up`.
struct FeedForward {
  Projection up, down;
  int64_t blocks;  // 0: no gate
  Activation activation;
};

void feed_forward(const FeedForward& network, int64_t m, const float* x, const Options& options,
                  const Kernels& kernels, const ForEach& for_each, float* y);

// A layer of a decoder for one token of each row.
struct Layer {
  int64_t batch, width;
  const float* x;                // [batch, width]
  Norm attention_norm, mlp_norm; // before attention and the network
  Norm attention_out_norm, mlp_out_norm;  // behind them; there are none where `scale` is nullptr
  Projection qkv;                // for each key-value head its queries, its key and its value
  Norm q_norm, k_norm;           // of each head; or none
  int64_t rotated;               // features of each head that are turned
  const float* sin;              // [batch, rotated]
  const float* cos;
  float query_scale;
  Attention attention;           // of which this fills in what isn't the cache
  Projection out;
  FeedForward mlp;
  bool parallel;                 // the network reads the layer's input, not what attention made of it
  float* y;                      // [batch, width]
};

void decode_layer(const Layer& layer, const Options& options, const Kernels& kernels, const ForEach& for_each);

}  // namespace jint8

#endif  // JINT8_DECODE_H_
