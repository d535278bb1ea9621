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

#if defined(JINT8_AVX512VNNI)
using Codes = __m512i;                // kCodes codes, one to a byte
constexpr int kCodeChannels = 4;      // that are multiplied at once, as many as there are registers for

// The first kCodes codes of a block of two groups, and those that are as many groups behind.
inline void unpack(const uint8_t* q, Codes* low, Codes* high) {
  const __m512i both = _mm512_loadu_si512(q), mask = _mm512_set1_epi8(15);
  *low = _mm512_and_si512(both, mask);
  *high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}

inline Codes read_codes(const uint8_t* codes) { return _mm512_loadu_si512(codes); }

// In each lane the sum of four codes times (256 high + low); `digits` has the high ones first.
inline Wide products(Codes c, const int8_t* digits) {
  const __m512i high = add_products(_mm512_setzero_si512(), c, _mm512_loadu_si512(digits));
  const __m512i both = add_products(_mm512_slli_epi32(high, 8), c, _mm512_loadu_si512(digits + kCodes));
  return (Wide)_mm512_cvtepi32_ps(both);
}
#else
struct Codes {
  alignas(64) uint8_t values[kCodes];
};
constexpr int kCodeChannels = 1;

inline void unpack(const uint8_t* q, Codes* low, Codes* high) {
  for (int i = 0; i < kCodes; ++i) low->values[i] = q[i] & 15, high->values[i] = q[i] >> 4;
}

inline Codes read_codes(const uint8_t* codes) {
  Codes out;
  __builtin_memcpy(out.values, codes, kCodes);
  return out;
}

inline Wide products(const Codes& codes, const int8_t* digits) {
  float parts[kWide];
#if defined(JINT8_AVX2) || defined(JINT8_AVXVNNI)
  for (int half = 0; half < 2; ++half) {
    const auto at = [half](const void* p) {
      return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half);
    };
    const __m256i c = at(codes.values), h = at(digits), l = at(digits + kCodes);
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
#elif defined(JINT8_NEON)
  for (int i = 0; i < 4; ++i) {
    const int8x16_t c = vreinterpretq_s8_u8(vld1q_u8(codes.values + 16 * i));
    const int32x4_t high = vdotq_s32(vdupq_n_s32(0), c, vld1q_s8(digits + 16 * i));
    vst1q_f32(parts + 4 * i, vcvtq_f32_s32(vdotq_s32(vshlq_n_s32(high, 8), c, vld1q_s8(digits + kCodes + 16 * i))));
  }
#else
  for (int lane = 0; lane < kWide; ++lane) {
    int32_t sum = 0;
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += codes.values[i] * (256 * digits[i] + digits[kCodes + i]);
    parts[lane] = static_cast<float>(sum);
  }
#endif
  return read_wide(parts);
}
#endif

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

void read_halves(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
#if defined(JINT8_AVX512VNNI)
  for (; i < count; i += 16) {  // stored whole: what is read soon after a store of a part has to wait for it
    const __mmask16 mask = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves + i)));
  }
#else
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_half(halves[i]);
  for (; i % kWide != 0; ++i) out[i] = 0.0f;
#endif
}

// Steps of `channels` channels times the units of R rows: factors[(r * C + c) * groups + g], groups in whole vectors.
// Channels beyond those that exist are the last one again. The channels' sums begin with what isn't multiplied by codes:
// least values times sums of the rows' groups, and columns in 16 bits.
template <int R, int C>
void factors_of(const CodeRows& rows, const CodeWeights& w, int channels, float* factors, Wide (&sums)[R][C]) {
  const int64_t groups = (rows.k + rows.group - 1) / rows.group, stride = rows.group_stride;
  alignas(64) float step[kMaxGroups], low[kMaxGroups];
  for (int c = 0; c < C; ++c) {
    const int64_t channel = c < channels ? c : channels - 1;
    read_halves(w.steps + channel * groups, groups, step);
    read_halves(w.least + channel * groups, groups, low);
    for (int r = 0; r < R; ++r) {
      sums[r][c] = Wide{};
      for (int64_t g = 0; g < stride; g += kWide) {
        write_wide(factors + (r * C + c) * stride + g, read_wide(step + g) * read_wide(rows.units + r * stride + g));
        sums[r][c] += read_wide(low + g) * read_wide(rows.sums + r * stride + g);
      }
    }
    for (int64_t i = 0; i < rows.columns; i += kWide) {
      const int64_t some = rows.columns - i < kWide ? rows.columns - i : kWide;
      read_halves(w.columns + channel * rows.columns + i, some, step);
      for (int r = 0; r < R; ++r) sums[r][c] += read_wide(step) * read_wide(rows.taken + r * rows.taken_stride + i);
    }
  }
}

// `multiply_codes` for R rows and C channels.
template <int R, int C>
void codes_of(const CodeRows& rows, const CodeWeights& w, int channels, float* out) {
  const int64_t group = rows.group, whole = rows.k / (2 * group), rest = rows.k - 2 * group * whole;
  const int64_t bytes = (rows.k + 1) / 2, stride = rows.group_stride;
  const uint8_t* channel[C];
  for (int c = 0; c < C; ++c) channel[c] = w.q + (c < channels ? c : channels - 1) * bytes;
  alignas(64) float factors[R * C * kMaxGroups];
  Wide sums[R][C];
  factors_of<R, C>(rows, w, channels, factors, sums);
  const auto add = [&](const Codes(&codes)[C], int64_t feature, int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int8_t* digits = rows.digits + r * rows.digit_stride + 2 * feature;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] += products(codes[c], digits) * factors[(r * C + c) * stride + g];
    }
  };
  Codes low[C], high[C];
  for (int64_t b = 0; b < whole; ++b) {
    for (int64_t i = 0; i < group; i += kCodes) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        __builtin_prefetch(channel[c] + C * bytes + b * group + i);
        unpack(channel[c] + b * group + i, &low[c], &high[c]);
      }
      add(low, 2 * b * group + i, 2 * b);
      add(high, (2 * b + 1) * group + i, 2 * b + 1);
    }
  }
  if (rest > 0) {  // a block of halves: into the order of the features, with zeros behind them
    const int64_t half = (rest + 1) / 2;
    uint8_t ordered[C][2 * kMaxGroup];
    for (int c = 0; c < C; ++c) {
      const uint8_t* last = channel[c] + whole * group;
      __builtin_memset(ordered[c], 0, static_cast<size_t>(2 * group));
      for (int64_t i = 0; i < half; ++i) ordered[c][i] = last[i] & 15;
      for (int64_t i = 0; i < rest - half; ++i) ordered[c][half + i] = last[i] >> 4;
    }
    for (int64_t i = 0; i < rest; i += kCodes) {
      for (int c = 0; c < C; ++c) low[c] = read_codes(ordered[c] + i);
      add(low, 2 * group * whole + i, 2 * whole + (i >= group));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < channels; ++c) out[r * kDotChannels + c] = total(sums[r][c]);
  }
}

void multiply_codes(const CodeRows& rows, CodeWeights w, int channels, float* out) {
  const int64_t bytes = (rows.k + 1) / 2, groups = (rows.k + rows.group - 1) / rows.group;
  for (int c = 0; c < channels; c += kCodeChannels) {
    const int some = channels - c < kCodeChannels ? channels - c : kCodeChannels;
    switch (rows.count) {
      case 4: codes_of<4, kCodeChannels>(rows, w, some, out + c); break;
      case 3: codes_of<3, kCodeChannels>(rows, w, some, out + c); break;
      case 2: codes_of<2, kCodeChannels>(rows, w, some, out + c); break;
      default: codes_of<1, kCodeChannels>(rows, w, some, out + c);
    }
    w.q += kCodeChannels * bytes, w.columns += kCodeChannels * rows.columns;
    w.steps += kCodeChannels * groups, w.least += kCodeChannels * groups;
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
