// How one instruction set holds integers and multiplies them, as `Isa`. Chosen by a macro: JINT8_GENERIC, JINT8_AVX2,
// JINT8_AVXVNNI, JINT8_AVX512VNNI, JINT8_AMX or JINT8_NEON.
//
//   Value      an activation as it is stored, `kBias` larger than the integer that it stands for
//   Packed     a weight as `tile` reads it
//   kLanes     32-bit sums of a vector
//
// For `dots`, which goes along the features (kStep of them at a time, for up to kRows rows):
//   Vector     partial sums
//   Weights    kStep weights of one channel
//   add        Vector plus the products of activations and weights
//   reduce     four vectors to their four sums
//
// For `tile`, where a lane is a row (kChannels channels at a time, for one or two blocks of rows):
//   broadcast  as many weights of one channel as are 32 bits of Packed, in all lanes
//   multiply   Vector plus the products of each lane's activations and those weights
#ifndef JINT8_ISA_H_
#define JINT8_ISA_H_

#include "kernels.h"

#if defined(JINT8_AMX)
#define JINT8_AVX512VNNI  // for few rows, and for all that isn't a product
#endif
#if defined(JINT8_AVX2) || defined(JINT8_AVXVNNI) || defined(JINT8_AVX512VNNI)
#include <immintrin.h>
#endif
#if defined(JINT8_NEON)
#include <arm_neon.h>
#endif

namespace jint8 {
namespace {

inline int32_t read_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}

#if defined(JINT8_AVX2) || defined(JINT8_AVXVNNI) || defined(JINT8_AVX512VNNI)
// out[i] = the sum of the i-th vector.
inline void sums_of_four(__m256i a, __m256i b, __m256i c, __m256i d, int32_t* out) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
}
#endif

#if defined(JINT8_AVX512VNNI)

// Adds four products of bytes to each sum. Not the intrinsic, because some compilers copy the sum before and after it.
inline __m512i add_products(__m512i sum, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

struct Isa {
  using Value = uint8_t;
  using Packed = int8_t;
  using Vector = __m512i;
  using Weights = __m512i;
  static constexpr int kStep = 64, kRows = 4, kBias = 128, kLanes = 16, kFewRows = 4;
  static constexpr int kChannels[] = {16, 8};
  static constexpr const char* kName = "avx512-vnni";
  static Vector zero() { return _mm512_setzero_si512(); }
  static Weights load(const int8_t* w) { return _mm512_loadu_si512(w); }
  static Vector add(Vector sum, const Value* x, Weights w) { return add_products(sum, lanes(x), w); }
  static Vector add_ones(Vector sum, Weights w) { return add_products(sum, _mm512_set1_epi8(1), w); }
  static __m256i halves(Vector v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
  static void reduce(const Vector* v, int32_t* out) {
    sums_of_four(halves(v[0]), halves(v[1]), halves(v[2]), halves(v[3]), out);
  }
  static Vector lanes(const Value* x) { return _mm512_loadu_si512(x); }
  static Vector broadcast(const Packed* w) { return _mm512_set1_epi32(read_word(w)); }
  static Vector multiply(Vector sum, Vector x, Vector w) { return add_products(sum, x, w); }
};

#elif defined(JINT8_AVXVNNI)

// As above. `{vex}`, because the same instruction of AVX512 may be missing.
inline __m256i add_products(__m256i sum, __m256i x, __m256i w) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
  return sum;
}

struct Isa {
  using Value = uint8_t;
  using Packed = int8_t;
  using Vector = __m256i;
  using Weights = __m256i;
  static constexpr int kStep = 32, kRows = 2, kBias = 128, kLanes = 8, kFewRows = 4;
  static constexpr int kChannels[] = {8, 4};
  static constexpr const char* kName = "avx-vnni";
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector lanes(const Value* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static Weights load(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static Vector add(Vector sum, const Value* x, Weights w) { return add_products(sum, lanes(x), w); }
  static Vector add_ones(Vector sum, Weights w) { return add_products(sum, _mm256_set1_epi8(1), w); }
  static void reduce(const Vector* v, int32_t* out) { sums_of_four(v[0], v[1], v[2], v[3], out); }
  static Vector broadcast(const Packed* w) { return _mm256_set1_epi32(read_word(w)); }
  static Vector multiply(Vector sum, Vector x, Vector w) { return add_products(sum, x, w); }
};

#elif defined(JINT8_AVX2)

// Without an instruction for four products of bytes: products of 16-bit pairs, which can't overflow. (The one for
// pairs of bytes saturates.)
struct Isa {
  using Value = int16_t;
  using Packed = int16_t;
  using Vector = __m256i;
  struct Weights {
    __m256i low, high;
  };
  static constexpr int kStep = 32, kRows = 2, kBias = 0, kLanes = 8, kFewRows = 4;
  static constexpr int kChannels[] = {8, 4};
  static constexpr const char* kName = "avx2";
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector lanes(const Value* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static Weights load(const int8_t* w) {
    const __m128i* p = reinterpret_cast<const __m128i*>(w);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(p)), _mm256_cvtepi8_epi16(_mm_loadu_si128(p + 1))};
  }
  static Vector add(Vector sum, const Value* x, Weights w) {
    return multiply(multiply(sum, lanes(x), w.low), lanes(x + 16), w.high);
  }
  static Vector add_ones(Vector sum, Weights) { return sum; }  // of no use where kBias is 0
  static void reduce(const Vector* v, int32_t* out) { sums_of_four(v[0], v[1], v[2], v[3], out); }
  static Vector broadcast(const Packed* w) { return _mm256_set1_epi32(read_word(w)); }
  static Vector multiply(Vector sum, Vector x, Vector w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
};

#elif defined(JINT8_NEON)

struct Isa {
  using Value = int8_t;
  using Packed = int8_t;
  using Vector = int32x4_t;
  struct Weights {
    int8x16_t low, high;
  };
  static constexpr int kStep = 32, kRows = 4, kBias = 0, kLanes = 4, kFewRows = 4;
  static constexpr int kChannels[] = {16, 8};
  static constexpr const char* kName = "neon-dotprod";
  static Vector zero() { return vdupq_n_s32(0); }
  static Vector lanes(const Value* x) { return vreinterpretq_s32_s8(vld1q_s8(x)); }
  static Weights load(const int8_t* w) { return {vld1q_s8(w), vld1q_s8(w + 16)}; }
  static Vector add(Vector sum, const Value* x, Weights w) {
    return vdotq_s32(vdotq_s32(sum, vld1q_s8(x), w.low), vld1q_s8(x + 16), w.high);
  }
  static Vector add_ones(Vector sum, Weights w) {
    return vdotq_s32(vdotq_s32(sum, vdupq_n_s8(1), w.low), vdupq_n_s8(1), w.high);
  }
  static void reduce(const Vector* v, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
  }
  static Vector broadcast(const Packed* w) { return vdupq_n_s32(read_word(w)); }
  static Vector multiply(Vector sum, Vector x, Vector w) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
  }
};

#else

// Plain C++, for other processors, and the one that the others are tested against.
struct Isa {
  using Value = int16_t;
  using Packed = int16_t;
  typedef int32_t Vector __attribute__((vector_size(16)));
  using Weights = const int8_t*;
  static constexpr int kStep = 32, kRows = 1, kBias = 0, kLanes = 4, kFewRows = 4;
  static constexpr int kChannels[] = {4, 2};
  static constexpr const char* kName = "generic";
  static Vector zero() { return Vector{}; }
  static Weights load(const int8_t* w) { return w; }
  static Vector add(Vector sum, const Value* x, Weights w) {
    int32_t step = 0;
    for (int i = 0; i < kStep; ++i) step += int32_t{x[i]} * int32_t{w[i]};
    return plus(sum, Vector{step, 0, 0, 0});
  }
  static Vector add_ones(Vector sum, Weights) { return sum; }
  static void reduce(const Vector* v, int32_t* out) {
    for (int c = 0; c < kDotChannels; ++c) out[c] = v[c][0];
  }
  static Vector lanes(const Value* x) {
    Vector v;
    __builtin_memcpy(&v, x, sizeof(v));
    return v;
  }
  static Vector broadcast(const Packed* w) {
    const int32_t word = read_word(w);
    return Vector{word, word, word, word};
  }
  static Vector multiply(Vector sum, Vector x, Vector w) {
    const auto half = [](int32_t word, int i) { return int32_t{static_cast<int16_t>(word >> (16 * i))}; };
    Vector products;
    for (int l = 0; l < kLanes; ++l) products[l] = half(x[l], 0) * half(w[l], 0) + half(x[l], 1) * half(w[l], 1);
    return plus(sum, products);
  }
  static Vector plus(Vector a, Vector b) {  // wraps around
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return (Vector)((Unsigned)a + (Unsigned)b);
  }
};

#endif

// Activations that hold an int8 alone can't hold a zero point as well: it is taken off the sums. 16 bits hold both.
constexpr bool kZeroInSums = sizeof(Isa::Value) == 1;
static_assert(Isa::kRows <= kDotRows, "a tile of more rows than `dots` is called for");
static_assert(2 * Isa::kLanes <= kMaxTileRows, "two blocks of more rows than `tile` is called for");

// A vector of 32-bit words, as compilers know it.
typedef int32_t Words __attribute__((vector_size(4 * Isa::kLanes)));
static_assert(sizeof(Words) == sizeof(Isa::Vector), "a lane for each row");

}  // namespace
}  // namespace jint8

#endif  // JINT8_ISA_H_
