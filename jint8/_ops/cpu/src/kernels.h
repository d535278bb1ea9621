// What one instruction set computes: rows to integers, and integer dot products of rows with weights as they are stored.
//
// `kernels.cc` is compiled once for each instruction set, into a namespace of its own; `product.cc` picks a table of
// these functions by what the processor has. The files of an instruction set use no inline function of the standard
// library: the linker keeps one copy of such a function, and might keep the one with instructions that are missing.
#ifndef JINT8_KERNELS_H_
#define JINT8_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace jint8 {

constexpr int kMaxRows = 6;      // rows of one call of `dots`
constexpr int kMaxChannels = 4;  // output channels of one call of `dots`

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

struct Kernels {
  const char* name;
  size_t bytes_per_value;  // of an activation, as `dots` reads it
  int rows;                // that one call of `dots` should have: as many as its registers hold

  // Rounds `x[k]` to integers, written to `out`. `x` has zeros where outliers were.
  RowInfo (*quantize)(const float* x, int64_t k, Rounding rounding, void* out);

  // out[r * kMaxChannels + c] = sum_k (integer - zero) * w[c * k + .], exact modulo 2^32, for `rows` rows that lie
  // `stride` values apart and `channels` channels. `zeros[r]` is the row's zero point.
  void (*dots)(const void* x, int64_t stride, int rows, const int32_t* zeros, const int8_t* w, int64_t k, int channels,
               int32_t* out);

  // sums[c] += value * weights[c] for channels 0 to `count`: an outlier of one row and its column of the weights. In
  // double precision, in which products are exact, because there may be as many outliers as features.
  void (*add_scaled)(float value, const float* weights, int count, double* sums);
};

// nullptr where the library was compiled without it.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neon_kernels();

}  // namespace jint8

#endif  // JINT8_KERNELS_H_
