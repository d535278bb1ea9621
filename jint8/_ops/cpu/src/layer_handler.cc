// The handler of a whole layer of a decoder, for one token of each row.

#include <algorithm>

#include "decode.h"
#include "operands.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {
namespace {

ffi::Error decode_layer_call(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::F32>> y,
                             ffi::Result<ffi::Buffer<ffi::F32>> key, ffi::Result<ffi::Buffer<ffi::F32>> value,
                             ffi::Span<const int64_t> rotations, int64_t group, int64_t groups, int64_t window, int64_t rotated, int64_t hidden, int64_t blocks,
                             int64_t activation, bool parallel, bool centered, float eps, float offset,
                             float query_scale, float softcap, float threshold, bool by_column, bool affine) {
  const auto yd = y->dimensions(), kd = key->dimensions();
  if (yd.size() != 2 || kd.size() != 4) return invalid("Expected y[b, d] and key[b, h, size, length].");
  const int64_t batch = yd[0], width = yd[1], heads = kd[1], size = kd[2], length = kd[3];
  const int64_t all = heads * groups * size;
  const bool known = kd[0] == batch && size % 16 == 0 && length > 0 && groups > 0 && rotated >= 0 && rotated <= size &&
                     rotated % 2 == 0 && hidden > 0 && blocks >= 0 && (blocks == 0 || hidden % blocks == 0) &&
                     activation >= 0 && activation <= 3 && softcap >= 0 && threshold >= 0 && rotations.size() == 4 && group >= 0;
  if (!known) return invalid("Sizes or options of a layer are out of range.");

  Operands operands(args);
  const Norm norm{nullptr, nullptr, eps, offset, centered};
  Layer layer{};
  layer.batch = batch, layer.width = width, layer.rotated = rotated, layer.query_scale = query_scale;
  layer.parallel = parallel, layer.y = y->typed_data();
  layer.x = operands.next<ffi::F32>(batch * width);
  layer.sin = operands.next<ffi::F32>(batch * rotated), layer.cos = operands.next<ffi::F32>(batch * rotated);
  const int32_t* const slot = operands.next<ffi::S32>(1);
  layer.attention = Attention{batch, heads, groups, size, length};
  layer.attention.first = operands.next<ffi::S32>(batch, true), layer.attention.window = window;
  layer.attention.change = ScoreChange{softcap, operands.next<ffi::F32>(heads * groups, true)};
  layer.attention_norm = operands.norm(width, norm);
  layer.qkv = operands.projection(heads * (groups + 2) * size, width, group, rotations[0]);
  layer.q_norm = operands.norm(size, norm, true), layer.k_norm = operands.norm(size, norm, true);
  layer.out = operands.projection(width, all, group, rotations[1]);
  layer.attention_out_norm = operands.norm(width, norm, true);
  layer.mlp_norm = operands.norm(width, norm);
  layer.mlp.up = operands.projection(blocks > 0 ? 2 * hidden : hidden, width, group, rotations[2]);
  layer.mlp.down = operands.projection(width, hidden, group, rotations[3]);
  layer.mlp.blocks = blocks, layer.mlp.activation = static_cast<Activation>(activation);
  layer.mlp_out_norm = operands.norm(width, norm, true);
  const int64_t cached = batch * heads * size * length;
  const float* const old_key = operands.next<ffi::F32>(cached);
  const float* const old_value = operands.next<ffi::F32>(cached);
  if (!operands.fit() || value->element_count() != static_cast<size_t>(cached)) {
    return invalid("Expected a layer's operands, of sizes that fit together.");
  }
  for (const Projection* p : {&layer.qkv, &layer.out, &layer.mlp.up, &layer.mlp.down}) {
    if (!in_range(*p, affine)) return invalid("k, groups or rotation of a weight are out of range.");
  }
  const Kernels* const kernels = chosen_kernels();
  if (!kernels) return invalid("JINT8_CPU_KERNELS names kernels that this processor can't run.");
  layer.attention.key = key->typed_data(), layer.attention.value = value->typed_data();
  copy_if_apart(old_key, layer.attention.key, cached);
  copy_if_apart(old_value, layer.attention.value, cached);
  layer.attention.slot = slot_within(*slot, length);
  const ForEach for_each = on_threads(pool, batch * (width * (layer.qkv.n + layer.mlp.up.n + hidden) + all * width));
  decode_layer(layer, Options{threshold, by_column && batch > 1, affine}, *kernels, for_each);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jint8

JINT8_EXPORTED XLA_FFI_Error* Jint8DecodeLayer(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Jint8DecodeLayer, jint8::decode_layer_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("rotations")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("rotated")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("activation")
                                  .Attr<bool>("parallel")
                                  .Attr<bool>("centered")
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<float>("query_scale")
                                  .Attr<float>("softcap")
                                  .Attr<float>("threshold")
                                  .Attr<bool>("by_column")
                                  .Attr<bool>("affine"));
