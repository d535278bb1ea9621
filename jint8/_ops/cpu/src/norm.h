// Norms, and rotary positions: what a layer does to a row beside its products.
#ifndef JINT8_NORM_H_
#define JINT8_NORM_H_

#include "exponential.h"
#include "kernels.h"

namespace jint8 {
namespace {

// The sum of (x[i] - center)^power, for powers 1 and 2.
template <int Power>
float sum_of_powers(const float* x, int64_t d, float center) {
  Wide sums{};
  int64_t i = 0;
  for (; i + kWide <= d; i += kWide) {
    const Wide values = read_wide(x + i) - center;
    sums += Power == 2 ? values * values : values;
  }
  float sum = 0;
  for (int j = 0; j < kWide; ++j) sum += sums[j];
  for (; i < d; ++i) sum += Power == 2 ? (x[i] - center) * (x[i] - center) : x[i] - center;
  return sum;
}

void normalize(const float* x, int64_t d, const Norm& norm, float* out) {
  const float size = static_cast<float>(d), mean = norm.centered ? sum_of_powers<1>(x, d, 0.0f) / size : 0.0f;
  const float factor = 1.0f / __builtin_sqrtf(sum_of_powers<2>(x, d, mean) / size + norm.eps);
  if (norm.bias) {
    for (int64_t i = 0; i < d; ++i) out[i] = (x[i] - mean) * factor * (norm.scale[i] + norm.offset) + norm.bias[i];
  } else {
    for (int64_t i = 0; i < d; ++i) out[i] = (x[i] - mean) * factor * (norm.scale[i] + norm.offset);
  }
}

void turn(float* x, int64_t rotated, const float* sin, const float* cos) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    x[i] = first * cos[i] + second * sin[i];
    x[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_NORM_H_
