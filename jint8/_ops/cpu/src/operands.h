// Operands of a call that has many.
#ifndef JINT8_OPERANDS_H_
#define JINT8_OPERANDS_H_

#include "projection.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {

namespace ffi = xla::ffi;

// Takes a call's operands one after the other, and remembers whether each had the type and the size that it should
// have. One that may be missing has no elements then, and is nullptr.
class Operands {
 public:
  explicit Operands(ffi::RemainingArgs args) : args_(args) {}

  template <ffi::DataType Type>
  auto next(int64_t count, bool may_miss = false) {
    const auto buffer = args_.get<ffi::Buffer<Type>>(index_++);
    using Pointer = decltype(buffer->typed_data());
    const int64_t size = buffer.has_value() ? static_cast<int64_t>(buffer->element_count()) : -1;
    if (size == 0 && may_miss) return Pointer{nullptr};
    if (size != count) fit_ = false;
    return size == count ? buffer->typed_data() : Pointer{nullptr};
  }

  Norm norm(int64_t size, const Norm& like, bool may_miss = false) {
    Norm norm = like;
    norm.scale = next<ffi::F32>(size, may_miss), norm.bias = next<ffi::F32>(size, true);
    return norm;
  }

  // In the order of `Projection` in decode.py. `group` is 0 for int8; `columns` is the size of that operand.
  Projection projection(int64_t n, int64_t k, int64_t group, int64_t block) {
    Projection p{};
    p.n = n, p.k = k, p.group = group, p.block = block;
    const int64_t groups = group > 0 ? (k + group - 1) / group : 0;
    if (group > 0) {
      p.codes = next<ffi::U8>(n * ((k + 1) / 2));
    } else {
      p.q = next<ffi::S8>(n * k);
    }
    p.scale = next<ffi::F32>(n), p.zero = next<ffi::F32>(n, true), p.bias = next<ffi::F32>(n, true);
    p.smooth = next<ffi::F32>(k, true);
    p.group_scale = halves(n * groups), p.group_min = halves(n * groups);
    p.columns = size();
    p.index = next<ffi::S32>(p.columns), p.column_weights = halves(n * p.columns);
    return p;
  }

  // Whether all were as they should be, and none is left.
  bool fit() const { return fit_ && index_ == args_.size(); }

 private:
  const uint16_t* halves(int64_t count) {
    const auto buffer = args_.get<ffi::Buffer<ffi::F16>>(index_++);
    fit_ = fit_ && buffer.has_value() && static_cast<int64_t>(buffer->element_count()) == count;
    return fit_ ? static_cast<const uint16_t*>(buffer->untyped_data()) : nullptr;
  }

  // Of the next operand.
  int64_t size() const {
    const auto buffer = args_.get<ffi::AnyBuffer>(index_);
    return buffer.has_value() ? static_cast<int64_t>(buffer->element_count()) : 0;
  }

  const ffi::RemainingArgs args_;
  size_t index_ = 0;
  bool fit_ = true;
};

}  // namespace jint8

#endif  // JINT8_OPERANDS_H_
