#include "decode.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace jint8 {
namespace {

constexpr int64_t kGatedPerTask = 16'384;

std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// Norms of rows, or a copy of them where there is no norm.
void normalize_rows(const Norm& norm, const float* x, int64_t rows, int64_t d, const Kernels& kernels, float* out) {
  for (int64_t r = 0; r < rows; ++r) kernels.normalize(x + r * d, d, norm, out + r * d);
}

// sum = x + (the norm of) h
void add(const float* x, float* h, const Norm& norm, int64_t rows, int64_t d, const Kernels& kernels, float* sum) {
  if (norm.scale) normalize_rows(norm, h, rows, d, kernels, h);
  for (int64_t i = 0; i < rows * d; ++i) sum[i] = x[i] + h[i];
}

}  // namespace

void attend_head(const Attention& a, int64_t i, const Kernels& kernels) {
  float* keys = a.key + i * a.size * a.length;
  float* values = a.value + i * a.length * a.size;
  for (int64_t d = 0; d < a.size; ++d) keys[d * a.length + a.slot] = a.own_key[i * a.own_stride + d];
  std::memcpy(values + a.slot * a.size, a.own_value + i * a.own_stride, a.size * sizeof(float));
  int64_t begin = a.first ? std::max<int64_t>(a.first[i / a.heads], 0) : 0;
  if (a.window > 0) begin = std::max(begin, a.slot + 1 - a.window);
  begin = std::min(begin, a.slot);
  const auto scores = floats(kAttendGroups * (a.length + kAttendPadding));
  ScoreChange change = a.change;
  if (change.slopes) change.slopes += i % a.heads * a.groups;
  kernels.attend(a.q + i * a.q_stride, static_cast<int>(a.groups), HeadCache{keys, values, a.size, a.length}, change,
                 begin, a.slot + 1, scores.get(), a.out + i * a.groups * a.size);
}

void feed_forward(const FeedForward& network, int64_t m, const float* x, const Options& options,
                  const Kernels& kernels, const ForEach& for_each, float* y) {
  const int64_t n = network.down.k, blocks = std::max<int64_t>(network.blocks, 1), block = n / blocks;
  const auto both = floats(m * network.up.n), hidden = floats(m * n);
  project(network.up, m, x, options, kernels, for_each, both.get());
  const int64_t some = std::max<int64_t>(1, kGatedPerTask / std::max<int64_t>(block, 1));
  for_each((m * blocks + some - 1) / some, [&](int64_t task) {
    for (int64_t i = task * some; i < std::min(m * blocks, (task + 1) * some); ++i) {
      const float* first = both.get() + (network.blocks ? 2 : 1) * i * block;
      kernels.gated(first, network.blocks ? first + block : nullptr, block, network.activation,
                    hidden.get() + i * block);
    }
  });
  project(network.down, m, hidden.get(), options, kernels, for_each, y);
}

void decode_layer(const Layer& layer, const Options& options, const Kernels& kernels, const ForEach& for_each) {
  const int64_t rows = layer.batch, d = layer.width;
  const auto h = floats(rows * d), added = floats(rows * d), qkv = floats(rows * layer.qkv.n);
  const auto attended = floats(rows * layer.out.k);
  normalize_rows(layer.attention_norm, layer.x, rows, d, kernels, h.get());
  project(layer.qkv, rows, h.get(), options, kernels, for_each, qkv.get());

  Attention attention = layer.attention;
  const int64_t size = attention.size, groups = attention.groups, stride = (groups + 2) * size;
  attention.q = qkv.get(), attention.q_stride = stride;
  attention.own_key = qkv.get() + groups * size;
  attention.own_value = attention.own_key + size, attention.own_stride = stride;
  attention.out = attended.get();
  for_each(rows * attention.heads, [&](int64_t i) {
    const int64_t row = i / attention.heads;
    float* head = qkv.get() + i * stride;  // a query after the other, and then the key
    for (int64_t g = 0; g <= groups; ++g, head += size) {
      const Norm& norm = g < groups ? layer.q_norm : layer.k_norm;
      if (norm.scale) kernels.normalize(head, size, norm, head);
      if (layer.rotated > 0) {
        kernels.turn(head, layer.rotated, layer.sin + row * layer.rotated, layer.cos + row * layer.rotated);
      }
      for (int64_t j = 0; j < size && g < groups; ++j) head[j] *= layer.query_scale;
    }
    attend_head(attention, i, kernels);
  });
  project(layer.out, rows, attended.get(), options, kernels, for_each, h.get());
  add(layer.x, h.get(), layer.attention_out_norm, rows, d, kernels, added.get());

  normalize_rows(layer.mlp_norm, layer.parallel ? layer.x : added.get(), rows, d, kernels, h.get());
  feed_forward(layer.mlp, rows, h.get(), options, kernels, for_each, h.get());
  add(added.get(), h.get(), layer.mlp_out_norm, rows, d, kernels, layer.y);
}

}  // namespace jint8
