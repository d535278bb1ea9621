// The table of one instruction set's kernels, chosen by a macro: see isa.h.

#include "kernels.h"

#include "attention.h"
#include "codes.h"
#include "dots.h"
#include "finish.h"
#include "gated.h"
#include "isa.h"
#include "norm.h"
#include "rounding.h"
#include "tiles.h"

namespace jint8 {
namespace {

#if defined(JINT8_AMX)
constexpr const char* kName = "amx-int8";
#else
constexpr const char* kName = Isa::kName;
#endif

const Kernels kTable = {kName,    Isa::kFewRows, Isa::kRows, Isa::kLanes, kStrip,       sizeof(Isa::Value),
                        mark_outliers, quantize, dots, pack, load_strip, strip_bytes, tile, finish,
                        attend, gated, normalize, turn, round_groups, multiply_codes, read_halves, rotate, begin, end};

}  // namespace

#if defined(JINT8_AMX)
const Kernels* amx_kernels() { return &kTable; }
#elif defined(JINT8_AVX512VNNI)
const Kernels* avx512vnni_kernels() { return &kTable; }
#elif defined(JINT8_AVXVNNI)
const Kernels* avxvnni_kernels() { return &kTable; }
#elif defined(JINT8_AVX2)
const Kernels* avx2_kernels() { return &kTable; }
#elif defined(JINT8_NEON)
const Kernels* neon_kernels() { return &kTable; }
#else
const Kernels* generic_kernels() { return &kTable; }
#endif

}  // namespace jint8
