// A weight of any kind that the library multiplies, with what is done to activations before: of plain arrays, in float32.
#ifndef JINT8_PROJECTION_H_
#define JINT8_PROJECTION_H_

#include "product.h"

namespace jint8 {

struct Projection {
  int64_t n, k;
  const int8_t* q;     // int8 [n, k], or nullptr
  const float* scale;  // [n]
  const float* zero;   // [n], or nullptr
  const float* bias;   // [n], or nullptr

  // Of four bits: two codes to a byte, in blocks of two groups, and each group's step and least value.
  const uint8_t* codes;         // [n, (k + 1) / 2], or nullptr
  int64_t group;                // features of a group
  const uint16_t* group_scale;  // float16 [n, groups]
  const uint16_t* group_min;

  // What the weight's features were scaled by, and then rotated in blocks: so are activations.
  const float* smooth;  // [k], or nullptr
  int64_t block;        // up to 1: no rotation

  // Columns in 16 bits, which are taken out of the activations before all that. An index of k is of a column that
  // isn't used.
  int64_t columns;
  const int32_t* index;            // [columns]
  const uint16_t* column_weights;  // float16 [n, columns], in units of `scale`
};

// Whether sizes are in the range that `project` can compute.
bool in_range(const Projection& projection, bool affine);

// y[m, n] = x[m, k] times the projection.
void project(const Projection& projection, int64_t m, const float* x, const Options& options, const Kernels& kernels,
             const ForEach& for_each, float* y);

}  // namespace jint8

#endif  // JINT8_PROJECTION_H_
