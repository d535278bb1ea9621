// Few rows: dot products along the features, which are contiguous in both operands. `rows` times `channels` vectors of
// partial sums stay in registers; each is summed up at the end.
#ifndef JINT8_DOTS_H_
#define JINT8_DOTS_H_

#include "isa.h"

namespace jint8 {
namespace {

constexpr int64_t kAhead = 8192;  // bytes that are on their way from memory

// `dots` for a number of rows that is known to the compiler, which then keeps all sums in registers. Channels beyond
// those that exist are the last one again.
template <int R>
void dots_of(const Isa::Value* x, int64_t stride, const int32_t* zeros, const int8_t* w, int64_t k, int channels,
             int32_t* out) {
  constexpr int C = kDotChannels;
  const int8_t* rows[C];
  for (int c = 0; c < C; ++c) rows[c] = w + (c < channels ? c : channels - 1) * k;
  Isa::Vector sums[R][C], ones[C];
  for (int c = 0; c < C; ++c) {
    ones[c] = Isa::zero();
    for (int r = 0; r < R; ++r) sums[r][c] = Isa::zero();
  }
  // Whoever decodes reads all weights of a model once for each token, so they come from memory. To the processor this
  // order, of a few channels at a time, isn't one that it fetches ahead by itself.
  const int64_t ahead = (kAhead / (C * k) + 1) * C * k;
  const auto step = [&](int c, const int8_t* values, int64_t i) __attribute__((always_inline)) {
    __builtin_prefetch(values + ahead);
    const Isa::Weights weights = Isa::load(values);
    if (kZeroInSums) ones[c] = Isa::add_ones(ones[c], weights);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r][c] = Isa::add(sums[r][c], x + r * stride + i, weights);
  };
  int64_t i = 0;
  for (; i + Isa::kStep <= k; i += Isa::kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) step(c, rows[c] + i, i);
  }
  if (i < k) {  // what isn't a whole step, with zeros behind it; activations are allocated in whole steps
    int8_t tails[C][Isa::kStep] = {};
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      for (int64_t j = i; j < k; ++j) tails[c][j - i] = rows[c][j];
      step(c, tails[c], i);
    }
  }
  int32_t weight_sums[C] = {};
  if (kZeroInSums) Isa::reduce(ones, weight_sums);
  for (int r = 0; r < R; ++r) {
    int32_t* row = out + r * C;
    Isa::reduce(sums[r], row);
    if (!kZeroInSums) continue;
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
    if (Isa::kRows >= 4 && rows >= 4) {
      dots_of<4>(values, stride, zeros, w, k, channels, out), done = 4;
    } else if (Isa::kRows >= 2 && rows >= 2) {
      dots_of<2>(values, stride, zeros, w, k, channels, out), done = 2;
    } else {
      dots_of<1>(values, stride, zeros, w, k, channels, out), done = 1;
    }
    rows -= done, values += done * stride, zeros += done, out += done * kDotChannels;
  }
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_DOTS_H_
