// What one instruction set computes: rows to integers, and integer dot products of rows with weights as they are stored.
//
// `kernels.cc` is compiled once for each instruction set, into a namespace of its own; `product.cc` picks a table of
// these functions by what the processor has. The files of an instruction set use no inline function of the standard
// library: the linker keeps one copy of such a function, and might keep the one with instructions that are missing.
//
// There are two ways to multiply. Few rows meet the weights one after the other, features next to each other in both:
// `dots`. More rows are packed first, `lanes` of them to a block, so that one vector holds some features of all rows of
// the block; a few weights of one channel are multiplied by all of them at once: `tile`. In both ways weights are read
// as they are stored, output channel by output channel.
#ifndef JINT8_KERNELS_H_
#define JINT8_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace jint8 {

constexpr int kStep = 64;        // rows are padded to whole steps of so many features
constexpr int kDotRows = 4;      // rows of one call of `dots`, at most
constexpr int kDotChannels = 4;  // output channels of one call of `dots`
constexpr int kMaxStrip = 32;    // output channels of one call of `tile`, at most
constexpr int kMaxTileRows = 32; // rows of one call of `tile`, at most: two blocks

// The scheme of a row's integers.
struct Rounding {
  bool affine;  // with a zero point, from -128 to 127; otherwise from -127 to 127
};

// What is known of a row after it was rounded: value = scale * (integer - zero).
struct RowInfo {
  float scale;
  int32_t zero;
  int32_t sum;  // of (integer - zero) over the row
};

// The weights of a few output channels as `tile` reads them.
struct Strip {
  const void* data;
  int64_t stride;           // from one channel to the next, in values
  int32_t sums[kMaxStrip];  // of each channel's weights
};

// What a strip's sums are multiplied by. Channels beyond those that exist have zeros.
struct Channels {
  alignas(64) float scale[kMaxStrip];
  float zero[kMaxStrip];
  float bias[kMaxStrip];
  bool has_zero, has_bias;
};

// The outliers of some rows, and their columns of a strip's weights.
struct Outliers {
  int64_t columns;
  const float* values;   // [rows, columns]
  const double* sums;    // [rows]: of each row's values
  const float* weights;  // [columns, strip]
};

// Keys and values of one row's key-value head.
struct HeadCache {
  const float* key;    // [head_dim, length]
  const float* value;  // [length, head_dim]
  int64_t head_dim;    // a multiple of 16
  int64_t length;
};

constexpr int kCodes = 64;         // codes of four bits that are multiplied at once
constexpr int kMaxGroup = 1024;    // features of a group of such codes, a multiple of kCodes
constexpr int kMaxGroups = 2048;   // of a channel

// Some rows, up to four, that are multiplied by weights of four bits.
struct CodeRows {
  int count;
  int64_t k, group;
  const int8_t* digits;  // as `round_groups` writes them, rows `digit_stride` apart
  int64_t digit_stride;
  int64_t group_stride;  // groups of a row in `units` and `sums`: a multiple of 16, with zeros behind those that exist
  const float* units;
  const float* sums;
  int64_t columns;       // that were taken out, and have weights in 16 bits
  const float* taken;    // [count, taken_stride], with zeros behind the columns up to a multiple of 16
  int64_t taken_stride;
};

// The weights of some channels, one after the other.
struct CodeWeights {
  const uint8_t* q;         // codes, two to a byte in blocks of two groups
  const uint16_t* steps;    // float16 [groups]
  const uint16_t* least;    // float16 [groups]
  const uint16_t* columns;  // float16 [columns]
};

// What happens to scores before the softmax: cap * tanh(score / cap), then slopes[g] (slot - the token's) is added.
struct ScoreChange {
  float cap;            // 0: none
  const float* slopes;  // of each query, or nullptr
};

constexpr int kAttendGroups = 4;    // for so many queries at a time there is room for scores
constexpr int kAttendPadding = 16;  // scores of each query beside those of the slots

enum class Activation { kSilu, kTanhGelu, kRelu, kGelu };

// y = x / sqrt(mean(x^2) + eps) * (offset + scale) + bias, of x less its mean where it is centered.
struct Norm {
  const float* scale;  // nullptr: there is no norm
  const float* bias;   // nullptr: none
  float eps, offset;
  bool centered;
};

struct Kernels {
  const char* name;
  int few_rows;            // up to so many rows `dots` is faster than `tile`
  int dot_rows;            // rows that one call of `dots` should have: as many as its registers hold
  int lanes;               // rows of a block of packed rows
  int strip;               // output channels of one call of `tile`
  size_t bytes_per_value;  // of an activation, packed or not

  // Sets marks[i] for each feature i of the row `x[k]` whose magnitude has at least the bits `limit` and isn't NaN.
  // Several threads may mark at once: all write the same value.
  void (*mark_outliers)(const float* x, int64_t k, uint32_t limit, uint8_t* marks);

  // Rounds `x[k]` to integers, written to `out`. `x` has zeros where outliers were.
  RowInfo (*quantize)(const float* x, int64_t k, Rounding rounding, void* out);

  // out[r * kDotChannels + c] = sum_k (integer - zero) * w[c * k + .], exact modulo 2^32, for `rows` rows that lie
  // `stride` values apart and `channels` channels. `zeros[r]` is the row's zero point.
  void (*dots)(const void* x, int64_t stride, int rows, const int32_t* zeros, const int8_t* w, int64_t k, int channels,
               int32_t* out);

  // Packs a block of `lanes` rows of `stride` values, of which `rows` exist, to `lanes * stride` values.
  void (*pack)(const void* x, int64_t stride, int rows, void* out);

  // Prepares `channels` rows of weights w[c * k + .] for `tile`: themselves, or a copy in `scratch`, of
  // `strip * strip_bytes(k)` bytes, where they have to be padded or converted. The strip's sums are there if
  // `sums`, or if `tile` needs them.
  void (*load_strip)(const int8_t* w, int64_t k, int channels, bool sums, void* scratch, Strip* out);
  size_t (*strip_bytes)(int64_t k);

  // As `dots`, for one or two blocks of packed rows of `stride` values and a strip: out[r * strip + c].
  void (*tile)(const void* x, int64_t stride, int blocks, const int32_t* zeros, const Strip& strip, int32_t* out);

  // Sums of a strip to the result of `rows` rows, which are `stride` values apart, in all channels of a strip:
  //   y[r, c] = ((sums[r, c] - sum[r] zero[c]) * scale[r] + outliers[r, c]) * scale[c] + bias[c]
  // with the outliers of the row times the column's weights, less the zero points, in double precision, in which
  // products are exact, because there may be as many outliers as features.
  void (*finish)(const int32_t* sums, int rows, const RowInfo* info, const Outliers& outliers, const Channels& channels,
                 float* y, int64_t stride);

  // out[g, d] = softmax_s(sum_d q[g, d] key[d, s]) value[s, d] for slots s from `first` to before `last`, and `groups`
  // queries, with scores changed before. `scores` has room for kAttendGroups times (length + kAttendPadding).
  void (*attend)(const float* q, int groups, const HeadCache& cache, ScoreChange change, int64_t first, int64_t last,
                 float* scores, float* out);

  // out[i] = activation(gate[i]) * up[i], or without the factor where `up` is nullptr.
  void (*gated)(const float* gate, const float* up, int64_t count, Activation activation, float* out);

  // The norm of the row `x[d]`; `out` may be `x`.
  void (*normalize)(const float* x, int64_t d, const Norm& norm, float* out);

  // Rotary positions: x[i] and x[i + rotated / 2], for i below the half, are turned by an angle each. `sin` is negative
  // in its first half.
  void (*turn)(float* x, int64_t rotated, const float* sin, const float* cos);

  // Rounds the row `x[k]` to integers of two digits: `digits` has for each kCodes features their high and then their low
  // digits, up to the end of the last group; `units` and `sums` of the values are of each group.
  void (*round_groups)(const float* x, int64_t k, int64_t group, int8_t* digits, float* units, float* sums);

  // out[r * kDotChannels + c] = sum_g steps[c, g] units[r, g] (integers of row r times codes) + least[c, g] sums[r, g]
  //   + sum_i columns[c, i] taken[r, i]
  // for up to kDotChannels channels.
  void (*multiply_codes)(const CodeRows& rows, CodeWeights weights, int channels, float* out);

  // `count` floats of 16 bits to float32, with zeros behind them up to a multiple of 16.
  void (*read_halves)(const uint16_t* halves, int64_t count, float* out);

  // Each block of features of the row `x[k]` times a Hadamard matrix.
  void (*rotate)(float* x, int64_t k, int64_t block);

  // Before and after calls of `tile` on a thread.
  void (*begin)();
  void (*end)();
};

// nullptr where the library was compiled without it.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

}  // namespace jint8

#endif  // JINT8_KERNELS_H_
