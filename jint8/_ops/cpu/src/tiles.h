// Many rows: packed, so that a lane of a vector is a row, and multiplied by a few weights of one channel at a time. No
// vector has to be summed up, and a weight is read once for all rows of one or two blocks.
#ifndef JINT8_TILES_H_
#define JINT8_TILES_H_

#include "isa.h"

namespace jint8 {
namespace {

constexpr int L = Isa::kLanes;
constexpr int kPerWord = 4 / sizeof(Isa::Value);  // features of a row that lie next to each other in a packed block

// Of two vectors: their words in turn, those of the first half or of the second.
inline Words interleave(Words a, Words b, bool second) {
  Words indices;
  for (int i = 0; i < L; ++i) indices[i] = i / 2 + (second ? L / 2 : 0) + (i % 2 ? L : 0);
#if defined(__clang__)
  Words out;
  for (int i = 0; i < L; ++i) out[i] = indices[i] < L ? a[indices[i]] : b[indices[i] - L];
  return out;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

// L vectors to the vectors of their first, second, ... words. Interleaving the first half of a matrix with the second
// one moves the highest bit of each word's index to the lowest place; after log2(L) times, rows and columns have
// changed places.
inline void transpose(Words* v) {
#pragma GCC unroll 4
  for (int times = 1; times < L; times *= 2) {
    Words old[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) old[i] = v[i];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      v[2 * i] = interleave(old[i], old[i + L / 2], false);
      v[2 * i + 1] = interleave(old[i], old[i + L / 2], true);
    }
  }
}

#if defined(JINT8_AMX)
constexpr int32_t kSigned = static_cast<int32_t>(0x80808080u);  // from values that are 128 larger to signed ones
constexpr int kTileBias = 0;
constexpr int kStrip = 32;
constexpr int kStripStep = 64;  // features to which a strip is padded
#else
constexpr int32_t kSigned = 0;
constexpr int kTileBias = Isa::kBias;
constexpr int kStrip = 16;
constexpr int kStripStep = kPerWord;
#endif
static_assert(kStrip <= kMaxStrip, "a strip of more channels than its sums have room for");

void pack(const void* x, int64_t stride, int rows, void* out) {
  const char* values = static_cast<const char*>(x);
  char* packed = static_cast<char*>(out);
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Isa::Value));
  for (int64_t i = 0; i < bytes; i += sizeof(Words)) {
    Words v[L];
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      v[r] = Words{};
      if (r < rows) __builtin_memcpy(&v[r], values + r * bytes + i, sizeof(Words));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      v[r] ^= kSigned;
      __builtin_memcpy(packed + i * L + r * static_cast<int64_t>(sizeof(Words)), &v[r], sizeof(Words));
    }
  }
}

int64_t padded(int64_t k) { return (k + kStripStep - 1) / kStripStep * kStripStep; }

size_t strip_bytes(int64_t k) { return sizeof(Isa::Packed) * static_cast<size_t>(padded(k)); }

// The sums of each of `channels` channels' weights, four at a time; behind the last one they are its own again.
inline void sum_channels(const int8_t* w, int64_t k, int channels, int32_t* sums) {
  for (int c = 0; c < channels; c += 4) {
    Isa::Vector ones[4];
    for (int j = 0; j < 4; ++j) {
      const int8_t* values = w + (c + j < channels ? c + j : channels - 1) * k;
      ones[j] = Isa::zero();
      int64_t i = 0;
      for (; i + Isa::kStep <= k; i += Isa::kStep) ones[j] = Isa::add_ones(ones[j], Isa::load(values + i));
      if (i == k) continue;
      int8_t tail[Isa::kStep] = {};
      for (int64_t rest = i; rest < k; ++rest) tail[rest - i] = values[rest];
      ones[j] = Isa::add_ones(ones[j], Isa::load(tail));
    }
    Isa::reduce(ones, sums + c);
  }
}

void load_strip(const int8_t* w, int64_t k, int channels, bool sums, void* scratch, Strip* out) {
  constexpr bool converts = sizeof(Isa::Packed) != sizeof(int8_t);
  *out = Strip{w, k, {}};
  if (kZeroInSums && (sums || kTileBias != 0)) {
    sum_channels(w, k, channels, out->sums);
  }
  const bool whole = channels == kStrip && k % kStripStep == 0;
  if (!converts && whole) return;
  Isa::Packed* copy = static_cast<Isa::Packed*>(scratch);
  out->data = copy, out->stride = padded(k);
  for (int c = 0; c < kStrip; ++c, copy += out->stride) {
    const int64_t size = c < channels ? k : 0;
    for (int64_t i = 0; i < size; ++i) copy[i] = w[c * k + i];
    for (int64_t i = size; i < padded(k); ++i) copy[i] = 0;
  }
}

// Writes sums of kStrip channels, sums[c * stride + lane], row by row: out[lane * kStrip + c], with what the bias and
// the zero points of the rows make too much taken off.
inline void write_rows(const int32_t* sums, int stride, const int32_t* zeros, const Strip& strip, int32_t* out) {
  for (int c = 0; c < kStrip; c += L) {
    Words v[L], weights;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) __builtin_memcpy(&v[i], sums + (c + i) * stride, sizeof(Words));
    transpose(v);
    __builtin_memcpy(&weights, strip.sums + c, sizeof(Words));
    typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Words))));  // wraps around
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      const Unsigned offset = static_cast<uint32_t>(kTileBias + zeros[r]) - Unsigned{};
      if (kZeroInSums) v[r] = (Words)((Unsigned)v[r] - offset * (Unsigned)weights);
      __builtin_memcpy(out + r * kStrip + c, &v[r], sizeof(Words));
    }
  }
}

#if defined(JINT8_AMX)

// Eight tiles of 16 rows of 64 bytes. A weight's tile is 16 channels of 64 features, as they are stored; one of
// activations 16 words of features of 16 rows, as they are packed. Tiles 0 to 3 are sums of two times 16 channels and
// two times 16 rows.
struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Constant, because some compilers don't know that loading it reads all of it, and would leave out writing it.
const TileConfig kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kTiles); }

void end() { _tile_release(); }

void tile(const void* x, int64_t stride, int blocks, const int32_t* zeros, const Strip& strip, int32_t* out) {
  const int8_t* w = static_cast<const int8_t*>(strip.data);
  const int8_t* values = static_cast<const int8_t*>(x);
  const int64_t block = stride * L;
  const int64_t below = 16 * strip.stride;
  alignas(64) int32_t sums[2][kStrip * L];
  _tile_zero(0);
  _tile_zero(1);
  if (blocks == 1) {
    const int8_t* next = w + kStrip * strip.stride;
    for (int64_t i = 0; i < strip.stride; i += 64) {
      _tile_loadd(6, values + i * L, 64);
      _tile_loadd(4, w + i, strip.stride);
      _tile_dpbssd(0, 4, 6);
      // The time of few rows is that of weights on their way from memory: fetch those of the next strip.
      for (int64_t j = 0; j < kStrip; ++j) __builtin_prefetch(next + i * kStrip + j * 64);
      _tile_loadd(5, w + below + i, strip.stride);
      _tile_dpbssd(1, 5, 6);
    }
  } else {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < strip.stride; i += 64) {
      _tile_loadd(6, values + i * L, 64);
      _tile_loadd(4, w + i, strip.stride);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(5, w + below + i, strip.stride);
      _tile_dpbssd(1, 5, 6);
      _tile_loadd(7, values + block + i * L, 64);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(2, sums[1], 64);
    _tile_stored(3, sums[1] + 16 * L, 64);
    write_rows(sums[1], L, zeros + L, strip, out + L * kStrip);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[0] + 16 * L, 64);
  write_rows(sums[0], L, zeros, strip, out);
}

#else

void begin() {}
void end() {}

// `tile` for B blocks of rows, C channels at a time.
template <int B, int C>
void tile_of(const Isa::Value* x, int64_t stride, const int32_t* zeros, const Strip& strip, int32_t* out) {
  const Isa::Packed* w = static_cast<const Isa::Packed*>(strip.data);
  alignas(64) int32_t sums[kStrip][B * L];
  for (int start = 0; start < kStrip; start += C, w += C * strip.stride) {
    Isa::Vector v[C][B];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      for (int b = 0; b < B; ++b) v[c][b] = Isa::zero();
    }
    const Isa::Packed* four[(C + 3) / 4];  // every fourth channel, because there are few registers for addresses
    for (int c = 0; c < C; c += 4) four[c / 4] = w + c * strip.stride;
    const int64_t next[] = {0, strip.stride, 2 * strip.stride, 3 * strip.stride};
    for (int64_t i = 0; i < strip.stride; i += kPerWord) {
      Isa::Vector rows[B];
      for (int b = 0; b < B; ++b) rows[b] = Isa::lanes(x + b * stride * L + i * L);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const Isa::Vector weights = Isa::broadcast(four[c / 4] + next[c % 4] + i);
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) v[c][b] = Isa::multiply(v[c][b], rows[b], weights);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      for (int b = 0; b < B; ++b) __builtin_memcpy(&sums[start + c][b * L], &v[c][b], sizeof(Words));
    }
  }
  for (int b = 0; b < B; ++b) write_rows(&sums[0][b * L], B * L, zeros + b * L, strip, out + b * L * kStrip);
}

void tile(const void* x, int64_t stride, int blocks, const int32_t* zeros, const Strip& strip, int32_t* out) {
  const Isa::Value* values = static_cast<const Isa::Value*>(x);
  if (blocks == 1) return tile_of<1, Isa::kChannels[0]>(values, stride, zeros, strip, out);
  tile_of<2, Isa::kChannels[1]>(values, stride, zeros, strip, out);
}

#endif

}  // namespace
}  // namespace jint8

#endif  // JINT8_TILES_H_
