// Handlers of what a step of decoding does beside single products: attention of one token, and a gated feed-forward
// network.

#include <algorithm>
#include <cstring>

#include "decode.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S32 = ffi::Buffer<ffi::S32>;

// Writes the token's key and value into the cache's slot, then out[b, h, g, d] = softmax(q[b, h, g, d] keys) values
// over the slots from first[b] (or from 0) to the token's own; with a window, over the last ones of those.
ffi::Error decode_attention(ffi::ThreadPool pool, F32 q, F32 own_key, F32 own_value, F32 old_key, F32 old_value,
                            S32 slot, S32 first, ffi::Result<F32> out, ffi::Result<F32> key, ffi::Result<F32> value,
                            int64_t window) {
  const auto qd = q.dimensions(), kd = old_key.dimensions(), vd = old_value.dimensions();
  if (qd.size() != 4 || kd.size() != 4 || vd.size() != 4) return invalid("Expected q, key and value of four axes.");
  const int64_t batch = qd[0], heads = qd[1], groups = qd[2], size = qd[3], length = kd[3];
  const bool fits = kd[0] == batch && kd[1] == heads && kd[2] == size && vd[0] == batch && vd[1] == heads &&
                    vd[2] == length && vd[3] == size && size % 16 == 0 &&
                    own_key.element_count() == static_cast<size_t>(batch * heads * size) &&
                    own_value.element_count() == own_key.element_count() && slot.element_count() == 1 &&
                    (first.element_count() == 0 || first.element_count() == static_cast<size_t>(batch)) &&
                    out->element_count() == q.element_count() && key->element_count() == old_key.element_count() &&
                    value->element_count() == old_value.element_count();
  if (!fits) {
    return invalid("Expected q[b, h, g, d], own keys and values [b, h, d], key[b, h, d, l], value[b, h, l, d], first[b].");
  }
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  const int64_t at = slot_within(*slot.typed_data(), length);
  copy_if_apart(old_key.typed_data(), key->typed_data(), key->element_count());
  copy_if_apart(old_value.typed_data(), value->typed_data(), value->element_count());
  const ForEach for_each = on_threads(pool, 2 * batch * heads * groups * size * (at + 1));
  Attention attention{batch, heads, groups, size, length};
  attention.q = q.typed_data(), attention.q_stride = groups * size;
  attention.own_key = own_key.typed_data(), attention.own_value = own_value.typed_data(), attention.own_stride = size;
  attention.key = key->typed_data(), attention.value = value->typed_data(), attention.slot = at;
  attention.first = first.element_count() == 0 ? nullptr : first.typed_data();
  attention.window = window, attention.out = out->typed_data();
  for_each(batch * heads, [&](int64_t i) { attend_head(attention, i, *kernels); });
  return ffi::Error::Success();
}

// y = down(activation(gate(x)) * up(x)), for a fused weight in which `blocks` times some rows of the gate are followed
// by as many rows of the other factor.
ffi::Error gated_network(ffi::ThreadPool pool, F32 x, S8 gate_up, F32 gate_up_scale, F32 gate_up_zero, S8 down,
                         F32 down_scale, F32 down_zero, ffi::Result<F32> y, float threshold,
                         bool by_column, bool affine, int64_t blocks, int64_t activation) {
  const auto xd = x.dimensions(), gd = gate_up.dimensions(), dd = down.dimensions();
  if (xd.size() != 2 || gd.size() != 2 || dd.size() != 2) return invalid("Expected matrices.");
  const int64_t m = xd[0], d = xd[1], n = dd[1];
  const auto zeros_of = [](const F32& zero) { return zero.element_count() == 0 ? nullptr : zero.typed_data(); };
  const auto as_many = [](const F32& zero, int64_t count) {
    return zero.element_count() == 0 || zero.element_count() == static_cast<size_t>(count);
  };
  const bool fits = gd[0] == 2 * n && gd[1] == d && dd[0] == d && blocks > 0 && n % blocks == 0 &&
                    gate_up_scale.element_count() == static_cast<size_t>(2 * n) &&
                    down_scale.element_count() == static_cast<size_t>(d) && as_many(gate_up_zero, 2 * n) &&
                    as_many(down_zero, d) && y->element_count() == x.element_count();
  if (!fits) {
    return invalid("Expected x[m, d], gate_up[2 n, d], down[d, n], scales and zeros of their channels.");
  }
  if (std::max(d, n) > most_features(affine) || !(threshold >= 0)) return invalid("k or threshold is out of range.");
  if (activation < 0 || activation > 3) return invalid("Expected the number of an activation, from 0 to 3.");
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  const Options options{threshold, by_column && m > 1, affine};
  const ForEach for_each = on_threads(pool, 3 * m * n * d);
  const FeedForward network{
      {2 * n, d, gate_up.typed_data(), gate_up_scale.typed_data(), zeros_of(gate_up_zero)},
      {d, n, down.typed_data(), down_scale.typed_data(), zeros_of(down_zero)},
      blocks,
      static_cast<Activation>(activation)};
  feed_forward(network, m, x.typed_data(), options, *kernels, for_each, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jint8

JINT8_EXPORTED XLA_FFI_Error* Jint8DecodeAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Jint8DecodeAttention, jint8::decode_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::S32>()
                                  .Arg<jint8::S32>()
                                  .Ret<jint8::F32>()
                                  .Ret<jint8::F32>()
                                  .Ret<jint8::F32>()
                                  .Attr<int64_t>("window"));

JINT8_EXPORTED XLA_FFI_Error* Jint8GatedNetwork(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Jint8GatedNetwork, jint8::gated_network,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::S8>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::S8>()
                                  .Arg<jint8::F32>()
                                  .Arg<jint8::F32>()
                                  .Ret<jint8::F32>()
                                  .Attr<float>("threshold")
                                  .Attr<bool>("by_column")
                                  .Attr<bool>("affine")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("activation"));
