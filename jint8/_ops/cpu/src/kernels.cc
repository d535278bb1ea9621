// The kernels of one instruction set, chosen by a macro: JINT8_GENERIC, JINT8_AVX2, JINT8_AVXVNNI, JINT8_AVX512VNNI or
// JINT8_NEON. Compiled once for each; see kernels.h.
//
// A dot product runs along the features, which are contiguous in both operands, so weights are read as they are stored
// and never packed. `rows` times `channels` vectors of partial sums stay in registers; each is summed up at the end.

#include "kernels.h"

#if defined(JINT8_AVX2) || defined(JINT8_AVXVNNI) || defined(JINT8_AVX512VNNI)
#include <immintrin.h>
#endif
#if defined(JINT8_NEON)
#include <arm_neon.h>
#endif

namespace jint8 {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

inline uint32_t magnitude_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffffu;
}

// `Isa` says how one instruction set holds activations and sums up products:
//   Value      an activation as it is stored, `bias` larger than the integer that it stands for
//   Vector     partial sums, int32
//   Weights    `kStep` weights, ready to be multiplied
//   add        Vector plus the products of kStep activations and weights
//   reduce     four vectors to their four sums

#if defined(JINT8_AVX2) || defined(JINT8_AVXVNNI) || defined(JINT8_AVX512VNNI)
// out[i] = the sum of the i-th vector.
inline void sums_of_four(__m256i a, __m256i b, __m256i c, __m256i d, int32_t* out) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
}
#endif

#if defined(JINT8_AVX512VNNI)

struct Isa {
  using Value = uint8_t;
  using Vector = __m512i;
  using Weights = __m512i;
  static constexpr int kStep = 64, kRows = 6, kBias = 128;
  static constexpr const char* kName = "avx512-vnni";
  static Vector zero() { return _mm512_setzero_si512(); }
  static Weights load(const int8_t* w) { return _mm512_loadu_si512(w); }
  static Vector add(Vector sum, const Value* x, Weights w) { return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(x), w); }
  static Vector add_ones(Vector sum, Weights w) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), w); }
  static __m256i halves(Vector v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
  static void reduce(const Vector* v, int32_t* out) {
    sums_of_four(halves(v[0]), halves(v[1]), halves(v[2]), halves(v[3]), out);
  }
};

#elif defined(JINT8_AVXVNNI)

struct Isa {
  using Value = uint8_t;
  using Vector = __m256i;
  using Weights = __m256i;
  static constexpr int kStep = 32, kRows = 2, kBias = 128;
  static constexpr const char* kName = "avx-vnni";
  static Vector zero() { return _mm256_setzero_si256(); }
  static Weights load(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static Vector add(Vector sum, const Value* x, Weights w) {
    return _mm256_dpbusd_avx_epi32(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), w);
  }
  static Vector add_ones(Vector sum, Weights w) { return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), w); }
  static void reduce(const Vector* v, int32_t* out) { sums_of_four(v[0], v[1], v[2], v[3], out); }
};

#elif defined(JINT8_AVX2)

// Without an instruction for four products of bytes: products of 16-bit pairs, which can't overflow. (The one for
// pairs of bytes saturates.)
struct Isa {
  using Value = int16_t;
  using Vector = __m256i;
  struct Weights {
    __m256i low, high;
  };
  static constexpr int kStep = 32, kRows = 2, kBias = 0;
  static constexpr const char* kName = "avx2";
  static Vector zero() { return _mm256_setzero_si256(); }
  static Weights load(const int8_t* w) {
    const __m128i* p = reinterpret_cast<const __m128i*>(w);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(p)), _mm256_cvtepi8_epi16(_mm_loadu_si128(p + 1))};
  }
  static Vector add(Vector sum, const Value* x, Weights w) {
    const __m256i* p = reinterpret_cast<const __m256i*>(x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_loadu_si256(p), w.low));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_loadu_si256(p + 1), w.high));
  }
  static Vector add_ones(Vector sum, Weights) { return sum; }  // of no use where kBias is 0
  static void reduce(const Vector* v, int32_t* out) { sums_of_four(v[0], v[1], v[2], v[3], out); }
};

#elif defined(JINT8_NEON)

struct Isa {
  using Value = int8_t;
  using Vector = int32x4_t;
  struct Weights {
    int8x16_t low, high;
  };
  static constexpr int kStep = 32, kRows = 4, kBias = 0;
  static constexpr const char* kName = "neon-dotprod";
  static Vector zero() { return vdupq_n_s32(0); }
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
};

#else

// Plain C++, for other processors, and the one that the others are tested against.
struct Isa {
  using Value = int16_t;
  using Vector = uint32_t;  // unsigned, because sums wrap around
  using Weights = const int8_t*;
  static constexpr int kStep = 32, kRows = 1, kBias = 0;
  static constexpr const char* kName = "generic";
  static Vector zero() { return 0; }
  static Weights load(const int8_t* w) { return w; }
  static Vector add(Vector sum, const Value* x, Weights w) {
    int32_t step = 0;
    for (int i = 0; i < kStep; ++i) step += int32_t{x[i]} * int32_t{w[i]};
    return sum + static_cast<uint32_t>(step);
  }
  static Vector add_ones(Vector sum, Weights) { return sum; }
  static void reduce(const Vector* v, int32_t* out) {
    for (int c = 0; c < kMaxChannels; ++c) out[c] = static_cast<int32_t>(v[c]);
  }
};

#endif

// Activations that hold an int8 alone can't hold a zero point as well: it is taken off the sums. 16 bits hold both.
constexpr bool kZeroInSums = sizeof(Isa::Value) == 1;
static_assert(Isa::kRows <= kMaxRows, "a tile of more rows than `dots` is called for");

RowInfo quantize(const float* x, int64_t k, Rounding rounding, void* out) {
  Isa::Value* q = static_cast<Isa::Value*>(out);
  uint32_t largest = 0;
  float high = 0.0f, low = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  RowInfo row{__builtin_nanf(""), 0, 0};
  if (largest >= kInfinityBits) {  // the scale, and so the whole row of the result, is NaN
    for (int64_t i = 0; i < k; ++i) q[i] = static_cast<Isa::Value>(Isa::kBias);
    return row;
  }
  if (rounding.affine) {
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

// `dots` for numbers of rows and channels that are known to the compiler, which then keeps all sums in registers.
// Channels beyond those that exist are the last one again.
template <int R>
void dots_of(const Isa::Value* x, int64_t stride, const int32_t* zeros, const int8_t* w, int64_t k, int channels,
             int32_t* out) {
  constexpr int C = kMaxChannels;
  constexpr bool kSums = kZeroInSums;
  const int8_t* rows[C];
  for (int c = 0; c < C; ++c) rows[c] = w + (c < channels ? c : channels - 1) * k;
  Isa::Vector sums[R][C], ones[C];
  for (int c = 0; c < C; ++c) {
    ones[c] = Isa::zero();
    for (int r = 0; r < R; ++r) sums[r][c] = Isa::zero();
  }
  int64_t i = 0;
  for (; i + Isa::kStep <= k; i += Isa::kStep) {
    for (int c = 0; c < C; ++c) {
      const Isa::Weights weights = Isa::load(rows[c] + i);
      if (kSums) ones[c] = Isa::add_ones(ones[c], weights);
      for (int r = 0; r < R; ++r) sums[r][c] = Isa::add(sums[r][c], x + r * stride + i, weights);
    }
  }
  if (i < k) {  // what isn't a whole step, with zeros behind it; activations are allocated in whole steps
    for (int c = 0; c < C; ++c) {
      int8_t tail[Isa::kStep] = {};
      for (int64_t j = i; j < k; ++j) tail[j - i] = rows[c][j];
      const Isa::Weights weights = Isa::load(tail);
      if (kSums) ones[c] = Isa::add_ones(ones[c], weights);
      for (int r = 0; r < R; ++r) sums[r][c] = Isa::add(sums[r][c], x + r * stride + i, weights);
    }
  }
  int32_t weight_sums[C] = {};
  if (kSums) Isa::reduce(ones, weight_sums);
  for (int r = 0; r < R; ++r) {
    int32_t* row = out + r * C;
    Isa::reduce(sums[r], row);
    if (!kSums) continue;
    // sum (q - zero) w = sum (q + bias) w - (bias + zero) sum w, in unsigned integers, which wrap around
    const uint32_t offset = static_cast<uint32_t>(Isa::kBias + zeros[r]);
    for (int c = 0; c < C; ++c) {
      row[c] = static_cast<int32_t>(static_cast<uint32_t>(row[c]) - offset * static_cast<uint32_t>(weight_sums[c]));
    }
  }
}

void dots(const void* x, int64_t stride, int rows, const int32_t* zeros, const int8_t* w, int64_t k, int channels,
          int32_t* out) {
  const Isa::Value* values = static_cast<const Isa::Value*>(x);
  while (rows > 0) {
    int done;
    if (Isa::kRows >= 6 && rows >= 6) {
      dots_of<6>(values, stride, zeros, w, k, channels, out), done = 6;
    } else if (Isa::kRows >= 4 && rows >= 4) {
      dots_of<4>(values, stride, zeros, w, k, channels, out), done = 4;
    } else if (Isa::kRows >= 2 && rows >= 2) {
      dots_of<2>(values, stride, zeros, w, k, channels, out), done = 2;
    } else {
      dots_of<1>(values, stride, zeros, w, k, channels, out), done = 1;
    }
    rows -= done, values += done * stride, zeros += done, out += done * kMaxChannels;
  }
}

void add_scaled(float value, const float* weights, int count, double* sums) {
  for (int c = 0; c < count; ++c) sums[c] += double{value} * double{weights[c]};
}

const Kernels kTable = {Isa::kName, sizeof(Isa::Value), Isa::kRows, quantize, dots, add_scaled};

}  // namespace

#if defined(JINT8_AVX512VNNI)
const Kernels* avx512vnni_kernels() { return &kTable; }
#elif defined(JINT8_AVXVNNI)
const Kernels* avxvnni_kernels() { return &kTable; }
#elif defined(JINT8_AVX2)
const Kernels* avx2_kernels() { return &kTable; }
#elif defined(JINT8_NEON)
const Kernels* neon_kernels() { return &kTable; }
#else
const Kernels* generic_kernels() { return &kTable; }
#endif

}  // namespace jint8
