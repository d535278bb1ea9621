// The activation of a feed-forward network, and its gate: activation(gate) * up.
#ifndef JINT8_GATED_H_
#define JINT8_GATED_H_

#include "exponential.h"
#include "kernels.h"

namespace jint8 {
namespace {

inline Wide activated(Wide x, Activation activation) {
  if (activation == Activation::kRelu) return x < 0.0f ? Wide{} : x;  // NaN stays NaN
  if (activation == Activation::kGelu) return 0.5f * x * (1.0f + error_function(0.707106781f * x));
  // gelu(x) = x / 2 (1 + tanh(y)) = x sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
  const Wide y = activation == Activation::kSilu ? x : 1.59576912f * (x + 0.044715f * x * x * x);
  return x * (1.0f / (1.0f + exponential(-y)));
}

void gated(const float* gate, const float* up, int64_t count, Activation activation, float* out) {
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    const Wide values = activated(read_wide(gate + i), activation);
    write_wide(out + i, up ? values * read_wide(up + i) : values);
  }
  if (i == count) return;
  float rest[3][kWide] = {};
  for (int64_t j = i; j < count; ++j) rest[0][j - i] = gate[j], rest[1][j - i] = up ? up[j] : 1.0f;
  write_wide(rest[2], activated(read_wide(rest[0]), activation) * read_wide(rest[1]));
  for (int64_t j = i; j < count; ++j) out[j] = rest[2][j - i];
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_GATED_H_
