// Work on the threads of XLA's own pool.
#ifndef JINT8_THREADS_H_
#define JINT8_THREADS_H_

#include <algorithm>
#include <functional>
#include <memory>

#include "product.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {

constexpr int64_t kWorthThread = 1 << 17;  // products of two values; fewer take less time than waking a thread

// Runs on the threads of `pool` what has so many products of two values.
inline ForEach on_threads(xla::ffi::ThreadPool& pool, int64_t products) {
  const int64_t threads = std::min(pool.num_threads(), products / kWorthThread);
  const auto team = std::make_shared<Team<xla::ffi::ThreadPool>>(pool, threads);
  return [team](int64_t count, const std::function<void(int64_t)>& function) { team->run(count, function); };
}

inline bool float_of(xla::ffi::DataType type, Float* out) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return *out = Float::kF32, true;
    case xla::ffi::DataType::BF16:
      return *out = Float::kBF16, true;
    case xla::ffi::DataType::F16:
      return *out = Float::kF16, true;
    default:
      return false;
  }
}

inline xla::ffi::Error invalid(const char* message) {
  return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, message);
}

}  // namespace jint8

#define JINT8_EXPORTED extern "C" __attribute__((visibility("default")))

#endif  // JINT8_THREADS_H_
