// Integer sums and outliers to the result in floating point. All ways to multiply end here, so that a row's result
// doesn't depend on how many rows there are.
#ifndef JINT8_FINISH_H_
#define JINT8_FINISH_H_

#include "tiles.h"

namespace jint8 {
namespace {

constexpr int kPart = 8;  // channels that are computed at once
typedef double Doubles __attribute__((vector_size(8 * kPart)));
typedef float Floats __attribute__((vector_size(4 * kPart)));
typedef int32_t Integers __attribute__((vector_size(4 * kPart)));

template <typename Vector, typename Value>
inline Vector read(const Value* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// `finish` for R rows.
template <int R>
void finish_rows(const int32_t* sums, const RowInfo* info, const float* values, const double* outlier_sums,
                 const Outliers& outliers, const Channels& channels, float* y, int64_t stride) {
  for (int c = 0; c < kStrip; c += kPart) {
    Doubles products[R] = {};
    for (int64_t i = 0; i < outliers.columns; ++i) {
      bool any = false;
      for (int r = 0; r < R; ++r) any |= values[r * outliers.columns + i] != 0;
      if (!any) continue;  // adding zeros changes nothing
      const Doubles weights = __builtin_convertvector(read<Floats>(outliers.weights + i * kStrip + c), Doubles);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) products[r] += double{values[r * outliers.columns + i]} * weights;
    }
    const Floats scale = read<Floats>(channels.scale + c), bias = read<Floats>(channels.bias + c);
    const Floats zero = read<Floats>(channels.zero + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Floats regular = __builtin_convertvector(read<Integers>(sums + r * kStrip + c), Floats);
      if (channels.has_zero) {
        regular -= static_cast<float>(info[r].sum) * zero;
        if (outliers.columns > 0) products[r] -= outlier_sums[r] * __builtin_convertvector(zero, Doubles);
      }
      Floats result = regular * info[r].scale;
      if (outliers.columns > 0) result += __builtin_convertvector(products[r], Floats);
      result *= scale;
      if (channels.has_bias) result += bias;
      __builtin_memcpy(y + r * stride + c, &result, sizeof(result));
    }
  }
}

void finish(const int32_t* sums, int rows, const RowInfo* info, const Outliers& outliers, const Channels& channels,
            float* y, int64_t stride) {
  const float* values = outliers.values;
  const double* outlier_sums = outliers.sums;
  for (int r = 0; r < rows;) {
    const int some = rows - r >= 4 ? 4 : 1;
    if (some == 4) {
      finish_rows<4>(sums, info, values, outlier_sums, outliers, channels, y, stride);
    } else {
      finish_rows<1>(sums, info, values, outlier_sums, outliers, channels, y, stride);
    }
    r += some, sums += some * kStrip, info += some, y += some * stride;
    values += some * outliers.columns, outlier_sums += outliers.columns > 0 ? some : 0;
  }
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_FINISH_H_
