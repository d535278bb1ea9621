// The handler of a product of few rows and a weight of four bits, whose features may be smoothed and rotated, and some
// of whose columns may be in 16 bits.

#include <algorithm>
#include <vector>

#include "product.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using F16 = ffi::Buffer<ffi::F16>;

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kChannelsOfTask = 32;

const uint16_t* halves(const F16& buffer) { return static_cast<const uint16_t*>(buffer.untyped_data()); }

ffi::Error four_bit_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> q, F32 scale, F16 group_scale,
                            F16 group_min, ffi::Buffer<ffi::S32> index, F16 outlier_rows, F32 smooth, F32 bias,
                            ffi::Result<ffi::AnyBuffer> y, int64_t group, int64_t block) {
  const auto xd = x.dimensions(), qd = q.dimensions(), yd = y->dimensions();
  Float x_type, y_type;
  if (!float_of(x.element_type(), &x_type) || !float_of(y->element_type(), &y_type)) {
    return invalid("Expected x and y of float32, bfloat16 or float16.");
  }
  if (xd.size() != 2 || qd.size() != 2 || yd.size() != 2) return invalid("Expected matrices.");
  const int64_t m = xd[0], k = xd[1], n = qd[0], columns = static_cast<int64_t>(index.element_count());
  if (group <= 0 || group % kCodes != 0 || group > kMaxGroup || block < 0 || (block > 0 && k % block != 0)) {
    return invalid("Expected groups of a multiple of 64 features, up to 1024, and whole blocks.");
  }
  const int64_t groups = (k + group - 1) / group;
  const auto has = [](const auto& buffer, int64_t count) { return buffer.element_count() == static_cast<size_t>(count); };
  const bool fits = qd[1] == (k + 1) / 2 && yd[0] == m && yd[1] == n && has(scale, n) && groups <= kMaxGroups &&
                    has(group_scale, n * groups) && has(group_min, n * groups) && has(outlier_rows, n * columns) &&
                    (has(smooth, 0) || has(smooth, k)) && (has(bias, 0) || has(bias, n));
  if (!fits) return invalid("Expected sizes of x[m, k], the weight's arrays of n channels, and y[m, n] that fit together.");
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  const ForEach for_each = on_threads(pool, m * n * k);

  const int64_t stride = 2 * groups * group;
  std::vector<int8_t> digits(m * stride);
  std::vector<float> units(m * groups), sums(m * groups), taken(m * columns);
  for_each(m, [&](int64_t r) {
    std::vector<float> row(k);
    read_floats(x.untyped_data(), x_type, r * k, k, row.data());
    for (int64_t i = 0; i < columns; ++i) {  // an index of k is of a column that isn't used
      const int32_t column = index.typed_data()[i];
      if (column >= 0 && column < k) taken[r * columns + i] = row[column];
    }
    for (int64_t i = 0; i < columns; ++i) {
      const int32_t column = index.typed_data()[i];
      if (column >= 0 && column < k) row[column] = 0.0f;
    }
    for (int64_t i = 0; i < k && smooth.element_count() > 0; ++i) row[i] *= smooth.typed_data()[i];
    if (block > 1) kernels->rotate(row.data(), k, block);
    kernels->round_groups(row.data(), k, group, &digits[r * stride], &units[r * groups], &sums[r * groups]);
  });
  for_each((n + kChannelsOfTask - 1) / kChannelsOfTask, [&](int64_t task) {
    std::vector<float> outlier_weights(columns);
    for (int64_t c = task * kChannelsOfTask; c < std::min(n, (task + 1) * kChannelsOfTask); ++c) {
      for (int64_t i = 0; i < columns; ++i) outlier_weights[i] = from_half(halves(outlier_rows)[c * columns + i]);
      for (int64_t first = 0; first < m; first += kRowsAtOnce) {
        const CodeRows rows{static_cast<int>(std::min(kRowsAtOnce, m - first)), k, group, &digits[first * stride], stride,
                            &units[first * groups], &sums[first * groups]};
        float out[kRowsAtOnce];
        kernels->multiply_codes(rows, q.typed_data() + c * qd[1], halves(group_scale) + c * groups,
                                halves(group_min) + c * groups, out);
        for (int r = 0; r < rows.count; ++r) {
          float sum = out[r];
          for (int64_t i = 0; i < columns; ++i) sum += taken[(first + r) * columns + i] * outlier_weights[i];
          sum *= scale.typed_data()[c];
          if (bias.element_count() > 0) sum += bias.typed_data()[c];
          write_float(y->untyped_data(), y_type, (first + r) * n + c, sum);
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jint8

JINT8_EXPORTED XLA_FFI_Error* Jint8FourBitProduct(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Jint8FourBitProduct, jint8::four_bit_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F16>()
                                  .Arg<jint8::F16>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<jint8::F16>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("block"));
