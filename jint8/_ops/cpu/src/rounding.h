// Rows in floating point to rows of integers.
#ifndef JINT8_ROUNDING_H_
#define JINT8_ROUNDING_H_

#include "isa.h"

namespace jint8 {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

inline uint32_t magnitude_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffffu;
}

inline uint32_t largest_bits(const float* x, int64_t k) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

void mark_outliers(const float* x, int64_t k, uint32_t limit, uint8_t* marks) {
  for (int64_t start = 0; start < k; start += kStep) {
    const int64_t end = start + kStep < k ? start + kStep : k;
    if (largest_bits(x + start, end - start) < limit) continue;  // as in most steps
    for (int64_t i = start; i < end; ++i) {
      const uint32_t bits = magnitude_bits(x[i]);
      if (bits >= limit && bits <= kInfinityBits) __atomic_store_n(&marks[i], 1, __ATOMIC_RELAXED);
    }
  }
}

RowInfo quantize(const float* x, int64_t k, Rounding rounding, void* out) {
  Isa::Value* q = static_cast<Isa::Value*>(out);
  const uint32_t largest = largest_bits(x, k);
  RowInfo row{__builtin_nanf(""), 0, 0};
  if (largest >= kInfinityBits) {  // the scale, and so the whole row of the result, is NaN
    for (int64_t i = 0; i < k; ++i) q[i] = static_cast<Isa::Value>(Isa::kBias);
    return row;
  }
  float low = 0.0f;
  if (rounding.affine) {
    float high = 0.0f;
    for (int64_t i = 0; i < k; ++i) {
      high = x[i] > high ? x[i] : high;
      low = x[i] < low ? x[i] : low;
    }
    row.scale = (high / 2 - low / 2) / 127.5f;  // of halves, because the range itself may overflow
  } else {
    float absmax;
    __builtin_memcpy(&absmax, &largest, sizeof(absmax));
    row.scale = absmax / 127.0f;
  }
  const bool tiny = row.scale < kSmallestNormal;  // then everything rounds to 0
  const float scale = tiny ? 1.0f : row.scale, keep = tiny ? 0.0f : 1.0f;
  const float zero = rounding.affine && !tiny ? __builtin_rintf(-128.0f - low / scale) : 0.0f;
  const float least = rounding.affine ? -128.0f : -127.0f;
  const int32_t offset = Isa::kBias - (kZeroInSums ? 0 : static_cast<int32_t>(zero));
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    float steps = __builtin_rintf(x[i] * keep / scale) + zero;
    steps = steps < least ? least : steps;
    steps = steps > 127.0f ? 127.0f : steps;
    const int32_t value = static_cast<int32_t>(steps);
    sum += value;
    q[i] = static_cast<Isa::Value>(value + offset);
  }
  row.zero = static_cast<int32_t>(zero);
  row.sum = sum - row.zero * static_cast<int32_t>(k);
  return row;
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_ROUNDING_H_
