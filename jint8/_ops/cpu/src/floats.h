// bfloat16, float16 and float32 arrays, read to float32 and written from it, rounded half to even. Functions are static,
// because the files of each instruction set have compiled ones of their own.
#ifndef JINT8_FLOATS_H_
#define JINT8_FLOATS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace jint8 {

enum class Float { kF32, kBF16, kF16 };

static inline size_t size_of(Float type) { return type == Float::kF32 ? 4 : 2; }

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float value = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormal numbers
  return sign ? -value : value;
}

static inline uint16_t to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>(bits_of_float(value) >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t bits = bits_of_float(magnitude);
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

static inline void read_floats(const void* data, Float type, int64_t start, int64_t count, float* out) {
  if (type == Float::kF32) {
    std::memcpy(out, static_cast<const float*>(data) + start, count * sizeof(float));
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(data) + start;
  if (type == Float::kBF16) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_of_bits(uint32_t{values[i]} << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = from_half(values[i]);
  }
}

// The row itself where it is of float32, otherwise a copy in `buffer`.
static inline const float* read_row(const void* data, Float type, int64_t start, int64_t count, float* buffer) {
  if (type == Float::kF32) return static_cast<const float*>(data) + start;
  read_floats(data, type, start, count, buffer);
  return buffer;
}

static inline void write_float(void* data, Float type, int64_t index, float value) {
  if (type == Float::kF32) {
    static_cast<float*>(data)[index] = value;
  } else if (type == Float::kF16) {
    static_cast<uint16_t*>(data)[index] = to_half(value);
  } else {
    const uint32_t bits = bits_of_float(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1);
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(rounded >> 16);
  }
}

}  // namespace jint8

#endif  // JINT8_FLOATS_H_
