// The handler of a product of few rows and a weight of four bits, whose features may be smoothed and rotated, and some
// of whose columns may be in 16 bits.

#include <vector>

#include "projection.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using F16 = ffi::Buffer<ffi::F16>;

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
  if (group <= 0) return invalid("Expected groups of features.");
  const int64_t groups = (k + group - 1) / group;
  const auto has = [](const auto& buffer, int64_t count) { return buffer.element_count() == static_cast<size_t>(count); };
  const bool fits = qd[1] == (k + 1) / 2 && yd[0] == m && yd[1] == n && has(scale, n) &&
                    has(group_scale, n * groups) && has(group_min, n * groups) && has(outlier_rows, n * columns) &&
                    (has(smooth, 0) || has(smooth, k)) && (has(bias, 0) || has(bias, n));
  if (!fits) return invalid("Expected sizes of x[m, k], the weight's arrays of n channels, and y[m, n] that fit together.");
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  const ForEach for_each = on_threads(pool, m * n * k);

  Projection p{};
  p.n = n, p.k = k, p.codes = q.typed_data(), p.group = group, p.block = block, p.scale = scale.typed_data();
  p.bias = has(bias, 0) ? nullptr : bias.typed_data();
  p.smooth = has(smooth, 0) ? nullptr : smooth.typed_data();
  p.group_scale = halves(group_scale), p.group_min = halves(group_min);
  p.columns = columns, p.index = index.typed_data(), p.column_weights = halves(outlier_rows);
  if (!in_range(p, false)) return invalid("Expected groups of a multiple of 64 features, up to 1024, and whole blocks.");
  std::vector<float> read(x_type == Float::kF32 ? 0 : m * k), written(y_type == Float::kF32 ? 0 : m * n);
  if (!read.empty()) read_floats(x.untyped_data(), x_type, 0, m * k, read.data());
  float* const out = y_type == Float::kF32 ? static_cast<float*>(y->untyped_data()) : written.data();
  project(p, m, read.empty() ? static_cast<const float*>(x.untyped_data()) : read.data(), Options{}, *kernels, for_each,
          out);
  for (size_t i = 0; i < written.size(); ++i) write_float(y->untyped_data(), y_type, i, written[i]);
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
