// The handler of a product that XLA calls: checks the buffers, and finds the arrays of each member of a batch.

#include <algorithm>
#include <vector>

#include "product.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {
namespace {

namespace ffi = xla::ffi;

// The batch dimensions of an operand: those before its own last `own`. Each is that of the result, or 1.
struct Batch {
  Batch(ffi::AnyBuffer::Dimensions dims, size_t own) : dims(dims.begin(), dims.end() - own) {
    size = 1;
    for (size_t i = dims.size() - own; i < dims.size(); ++i) size *= dims[i];
  }

  bool fits(const Batch& result) const {
    if (dims.size() != result.dims.size()) return false;
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] != 1 && dims[i] != result.dims[i]) return false;
    }
    return true;
  }

  bool alone() const {
    return std::all_of(dims.begin(), dims.end(), [](int64_t d) { return d == 1; });
  }

  // The member of this operand that belongs to number `member` of the result.
  int64_t index(const Batch& result, int64_t member) const {
    int64_t out = 0, step = 1;
    for (size_t i = dims.size(); i-- > 0;) {
      out += dims[i] == 1 ? 0 : member % result.dims[i] * step;
      step *= dims[i];
      member /= result.dims[i];
    }
    return out;
  }

  std::vector<int64_t> dims;
  int64_t size;  // elements of one member
};

ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> q, ffi::Buffer<ffi::F32> scale,
                ffi::Buffer<ffi::F32> zero, ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y, float threshold,
                bool by_column, bool affine) {
  const auto xd = x.dimensions(), qd = q.dimensions(), yd = y->dimensions();
  if (xd.size() < 2 || qd.size() < 2 || yd.size() < 2 || scale.dimensions().size() < 1 ||
      zero.dimensions().size() < 1 || bias.dimensions().size() < 1) {
    return invalid("Expected x[..., m, k], q[..., n, k], scale[..., n], zero[..., n or 0], bias[..., n or 0].");
  }
  Arrays arrays;
  if (!float_of(x.element_type(), &arrays.x_type) || !float_of(y->element_type(), &arrays.y_type)) {
    return invalid("Expected x and y of float32, bfloat16 or float16.");
  }
  arrays.m = xd[xd.size() - 2], arrays.k = xd[xd.size() - 1], arrays.n = qd[qd.size() - 2];
  const Batch xb(xd, 2), qb(qd, 2), yb(yd, 2), sb(scale.dimensions(), 1), zb(zero.dimensions(), 1),
      bb(bias.dimensions(), 1);
  const bool sizes = qd[qd.size() - 1] == arrays.k && yd[yd.size() - 2] == arrays.m && yd[yd.size() - 1] == arrays.n &&
                     sb.size == arrays.n && (zb.size == 0 || zb.size == arrays.n) &&
                     (bb.size == 0 || bb.size == arrays.n);
  if (!sizes || !xb.fits(yb) || !qb.fits(yb) || !sb.fits(yb) || !zb.fits(yb) || !bb.fits(yb)) {
    return invalid("Expected sizes of m, n, k and of batch dimensions that fit together.");
  }
  if (arrays.k > most_features(affine) || !(threshold >= 0)) return invalid("k or threshold is out of range.");
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  const Options options{threshold, by_column, affine};
  int64_t members = 1;
  for (const int64_t d : yb.dims) members *= d;
  // Rows that share their weights, and of which none decides for another, are one product.
  const bool independent = !by_column || threshold == 0 || arrays.m == 1;
  if (independent && members > 1 && xb.dims == yb.dims && qb.alone() && sb.alone() && zb.alone() && bb.alone()) {
    arrays.m *= members;
    members = 1;
  }
  const ForEach for_each = on_threads(pool, arrays.m * arrays.n * arrays.k);
  for (int64_t i = 0; i < members; ++i) {
    const auto part = [&](const Batch& batch, const float* data) {
      return batch.size == 0 ? nullptr : data + batch.index(yb, i) * batch.size;
    };
    const int64_t x_size = arrays.m * arrays.k, y_size = arrays.m * arrays.n;
    arrays.x = static_cast<const char*>(x.untyped_data()) + xb.index(yb, i) * x_size * size_of(arrays.x_type);
    arrays.q = q.typed_data() + qb.index(yb, i) * qb.size;
    arrays.scale = part(sb, scale.typed_data());
    arrays.zero = part(zb, zero.typed_data());
    arrays.bias = part(bb, bias.typed_data());
    arrays.y = static_cast<char*>(y->untyped_data()) + i * y_size * size_of(arrays.y_type);
    product(arrays, by_column && independent ? Options{threshold, false, affine} : options, *kernels, for_each);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jint8

JINT8_EXPORTED XLA_FFI_Error* Jint8Product(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Jint8Product, jint8::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("threshold")
                                  .Attr<bool>("by_column")
                                  .Attr<bool>("affine"));

// Which kernels run on this processor: "" where $JINT8_CPU_KERNELS names some that it hasn't.
JINT8_EXPORTED const char* jint8_cpu_kernels() {
  const jint8::Kernels* kernels = jint8::chosen_kernels();
  return kernels ? kernels->name : "";
}
