// The exponential function of a vector, and functions made of it.
#ifndef JINT8_EXPONENTIAL_H_
#define JINT8_EXPONENTIAL_H_

#include <stdint.h>

namespace jint8 {
namespace {

constexpr int kWide = 16;  // floats of a vector
typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef int32_t WideBits __attribute__((vector_size(4 * kWide)));

inline Wide read_wide(const float* p) {
  Wide v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline void write_wide(float* p, Wide v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Within two units in the last place of exp(x); 0 is 1.2e-38, NaN stays NaN. x = n log(2) + r, with |r| <= log(2) / 2:
// the exponential of r is its Taylor series, that of n log(2) is put together from bits.
inline Wide exponential(Wide x) {
  const Wide least = Wide{} - 87.3f, most = Wide{} + 88.8f, magic = Wide{} + 12582912.0f;  // 1.5 * 2^23
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Wide rounded = x * 1.44269504f + magic;  // n is in the lowest bits
  const Wide n = rounded - magic;
  const Wide r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, of which the first has few bits
  Wide p = Wide{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const WideBits power = ((WideBits)rounded - (WideBits)magic + 127) << 23;
  return p * (Wide)power;
}

inline Wide hyperbolic_tangent(Wide x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

// Within 2e-7 of erf(x). Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline Wide error_function(Wide x) {
  const Wide size = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
  Wide p = Wide{} + 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Wide y = 1.0f - p * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_EXPONENTIAL_H_
