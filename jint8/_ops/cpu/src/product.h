// One LLM.int8() product of plain arrays: what the handler in handler.cc calls, and what tests call without JAX.
#ifndef JINT8_PRODUCT_H_
#define JINT8_PRODUCT_H_

#include <cstdint>
#include <functional>

#include "floats.h"
#include "kernels.h"

namespace jint8 {

struct Options {
  float threshold;  // from which magnitude on a value is an outlier; 0: none is
  bool by_column;   // an outlier makes its whole column one
  bool affine;      // activations have a zero point
};

// As many features as there may be: products of up to 255 * 128, or of 128 * 128 without zero points, must not add up to
// more than an int32 holds.
constexpr int64_t most_features(bool affine) { return affine ? 65'000 : 131'071; }

// y[m, n] = x[m, k] times q[n, k], in units of scale[n] less zero[n], plus bias[n]. `zero` and `bias` may be nullptr.
struct Arrays {
  int64_t m, n, k;
  const void* x;
  Float x_type;
  const int8_t* q;
  const float* scale;
  const float* zero;
  const float* bias;
  void* y;
  Float y_type;
};

// Calls a function with 0 to `count` - 1, each once, on several threads or on one, and returns when all have ended.
using ForEach = std::function<void(int64_t count, const std::function<void(int64_t)>&)>;

void product(const Arrays& arrays, const Options& options, const Kernels& kernels, const ForEach& for_each);

// What `choose_kernels` returns for $JINT8_CPU_KERNELS, asked once.
const Kernels* chosen_kernels();

// The best kernels of this processor; `name` asks for others ("generic", "avx2", ...), nullptr where it hasn't those.
const Kernels* choose_kernels(const char* name);

}  // namespace jint8

#endif  // JINT8_PRODUCT_H_
