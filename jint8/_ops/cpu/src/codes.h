// Weights of four bits times rows in floating point.
//
// A row is written as integers of two int8 digits, `256 high + low`, with a unit for each group of features: 32,512 steps
// to either side of the group's largest, beside which the 15 steps of the weights are coarse. So a group's products are
// those of bytes, exact in int32, and only their sum is multiplied by the group's step.
#ifndef JINT8_CODES_H_
#define JINT8_CODES_H_

#include "exponential.h"
#include "floats.h"
#include "isa.h"
#include "rounding.h"

namespace jint8 {
namespace {

constexpr float kLargestOfTwoDigits = 127 * 256;

// sums[lane] += factor * (sums of codes[i] (256 high[i] + low[i])), for kCodes codes; `digits` has the high ones first.
inline void add_codes(Wide& sums, const uint8_t* codes, const int8_t* digits, float factor) {
#if defined(JINT8_AVX512VNNI)
  const __m512i c = _mm512_loadu_si512(codes);
  const __m512i high = add_products(_mm512_setzero_si512(), c, _mm512_loadu_si512(digits));
  const __m512i both = add_products(_mm512_slli_epi32(high, 8), c, _mm512_loadu_si512(digits + kCodes));
  sums += (Wide)_mm512_cvtepi32_ps(both) * factor;
#elif defined(JINT8_AVX2) || defined(JINT8_AVXVNNI)
  float parts[kWide];
  for (int half = 0; half < 2; ++half) {
    const auto at = [half](const void* p) {
      return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half);
    };
    const __m256i c = at(codes), h = at(digits), l = at(digits + kCodes);
#if defined(JINT8_AVXVNNI)
    const __m256i high = add_products(_mm256_setzero_si256(), c, h);
    const __m256i both = add_products(_mm256_slli_epi32(high, 8), c, l);
#else
    const __m256i ones = _mm256_set1_epi16(1);  // pairs of products of at most 15 * 128 fit in 16 bits
    const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(c, h), ones);
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(c, l), ones);
    const __m256i both = _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
#endif
    _mm256_storeu_ps(parts + 8 * half, _mm256_cvtepi32_ps(both));
  }
  sums += read_wide(parts) * factor;
#elif defined(JINT8_NEON)
  float parts[kWide];
  for (int i = 0; i < 4; ++i) {
    const int8x16_t c = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * i));
    const int32x4_t high = vdotq_s32(vdupq_n_s32(0), c, vld1q_s8(digits + 16 * i));
    vst1q_f32(parts + 4 * i, vcvtq_f32_s32(vdotq_s32(vshlq_n_s32(high, 8), c, vld1q_s8(digits + kCodes + 16 * i))));
  }
  sums += read_wide(parts) * factor;
#else
  float parts[kWide];
  for (int lane = 0; lane < kWide; ++lane) {
    int32_t sum = 0;
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += codes[i] * (256 * digits[i] + digits[kCodes + i]);
    parts[lane] = static_cast<float>(sum);
  }
  sums += read_wide(parts) * factor;
#endif
}

inline float total(Wide v) {
#if defined(JINT8_AVX512VNNI)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int lane = 0; lane < kWide; ++lane) sum += v[lane];
  return sum;
#endif
}

void round_groups(const float* x, int64_t k, int64_t group, int8_t* digits, float* units, float* sums) {
  for (int64_t start = 0, g = 0; start < k; start += group, ++g) {
    const int64_t size = k - start < group ? k - start : group;
    const uint32_t largest = largest_bits(x + start, size);
    float absmax;
    __builtin_memcpy(&absmax, &largest, sizeof(absmax));
    const bool finite = largest < kInfinityBits;
    const float unit = absmax / kLargestOfTwoDigits;
    const bool tiny = unit < kSmallestNormal;  // then everything rounds to 0
    units[g] = finite ? (tiny ? 0.0f : unit) : __builtin_nanf("");
    const float scale = finite && !tiny ? unit : 1.0f, keep = finite && !tiny ? 1.0f : 0.0f;
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[start + i];
    sums[g] = sum;
    for (int64_t chunk = 0; chunk < group; chunk += kCodes) {
      int8_t* high = digits + 2 * (start + chunk);
      const float* from = x + start + chunk;
      const int64_t left = size - chunk < 0 ? 0 : size - chunk < kCodes ? size - chunk : kCodes;
      for (int64_t i = 0; i < left; ++i) {
        const int32_t steps = finite ? static_cast<int32_t>(__builtin_rintf(from[i] * keep / scale)) : 0;
        const int32_t top = (steps + 128) >> 8;
        high[i] = static_cast<int8_t>(top);
        high[kCodes + i] = static_cast<int8_t>(steps - 256 * top);
      }
      for (int64_t i = left; i < kCodes; ++i) high[i] = high[kCodes + i] = 0;
    }
  }
}

inline void halves_to(uint8_t* low, uint8_t* high, const uint8_t* q) {
  for (int i = 0; i < kCodes; ++i) low[i] = q[i] & 15, high[i] = q[i] >> 4;
}

void read_halves(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_half(halves[i]);
}

// `multiply_codes` for R rows.
template <int R>
void codes_of(const CodeRows& rows, const uint8_t* q, const float* const* factors, float* out) {
  const int64_t group = rows.group, whole = rows.k / (2 * group), rest = rows.k - 2 * group * whole;
  Wide sums[R] = {};
  alignas(64) uint8_t low[kCodes], high[kCodes];
  const auto add = [&](const uint8_t* codes, int64_t feature, int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      add_codes(sums[r], codes, rows.digits + r * rows.digit_stride + 2 * feature, factors[r][g]);
    }
  };
  for (int64_t b = 0; b < whole; ++b) {
    for (int64_t i = 0; i < group; i += kCodes) {
      __builtin_prefetch(q + b * group + i + 4096);
      halves_to(low, high, q + b * group + i);
      add(low, 2 * b * group + i, 2 * b);
      add(high, (2 * b + 1) * group + i, 2 * b + 1);
    }
  }
  if (rest > 0) {  // a block of halves: into the order of the features, with zeros behind them
    const uint8_t* last = q + whole * group;
    const int64_t half = (rest + 1) / 2;
    uint8_t codes[2 * kMaxGroup];
    __builtin_memset(codes, 0, static_cast<size_t>(2 * group));
    for (int64_t i = 0; i < half; ++i) codes[i] = last[i] & 15;
    for (int64_t i = 0; i < rest - half; ++i) codes[half + i] = last[i] >> 4;
    for (int64_t i = 0; i < rest; i += kCodes) add(codes + i, 2 * group * whole + i, 2 * whole + (i >= group));
  }
  for (int r = 0; r < R; ++r) out[r] = total(sums[r]);
}

void multiply_codes(const CodeRows& rows, const uint8_t* q, const uint16_t* steps, const uint16_t* least, float* out) {
  const int64_t groups = (rows.k + rows.group - 1) / rows.group;
  float step[kMaxGroups], factor[4][kMaxGroups];
  read_halves(steps, groups, step);
  const float* factors[4];
  for (int r = 0; r < rows.count; ++r) {
    const float* units = rows.units + r * groups;
    for (int64_t g = 0; g < groups; ++g) factor[r][g] = step[g] * units[g];
    factors[r] = factor[r];
  }
  switch (rows.count) {
    case 4: codes_of<4>(rows, q, factors, out); break;
    case 3: codes_of<3>(rows, q, factors, out); break;
    case 2: codes_of<2>(rows, q, factors, out); break;
    default: codes_of<1>(rows, q, factors, out);
  }
  read_halves(least, groups, step);
  for (int r = 0; r < rows.count; ++r) {
    const float* sums = rows.sums + r * groups;
    Wide wide{};
    int64_t g = 0;
    for (; g + kWide <= groups; g += kWide) wide += read_wide(step + g) * read_wide(sums + g);
    float sum = g > 0 ? total(wide) : 0.0f;
    for (; g < groups; ++g) sum += step[g] * sums[g];
    out[r] += sum;
  }
}

// Each block of features times the Hadamard matrix of Sylvester's construction: sums and differences, in log2(block)
// steps.
void rotate(float* x, int64_t k, int64_t block) {
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int64_t start = 0; start < k; start += block) {
    for (int64_t half = 1; half < block; half *= 2) {
      for (int64_t i = start; i < start + block; i += 2 * half) {
        for (int64_t j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b, x[j + half] = a - b;
        }
      }
    }
    for (int64_t i = start; i < start + block; ++i) x[i] *= scale;
  }
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_CODES_H_
