// Work on the threads of XLA's own pool.
#ifndef JINT8_THREADS_H_
#define JINT8_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace jint8 {

constexpr int64_t kWorthThreads = 1 << 17;  // products of two values; fewer take less time than waking a thread

// Numbers that threads take, one after the other. The tasks hold it, so that one that starts late, when the call has
// ended, finds that nothing is left.
struct Work {
  explicit Work(int64_t count) : count(count) {}

  void run() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      (*function)(i);
      if (ended.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        all_ended.notify_all();
      }
    }
  }

  // Waits for what other threads have begun. They never wait for this one, so this ends although all threads of the
  // pool may be in a call like this.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_ended.wait(lock, [&] { return ended.load() == count; });
  }

  const int64_t count;
  const std::function<void(int64_t)>* function = nullptr;  // alive until all have ended
  std::atomic<int64_t> next{0}, ended{0};
  std::mutex mutex;
  std::condition_variable all_ended;
};

// Runs on the threads of `pool` what has so many products of two values.
inline ForEach on_threads(xla::ffi::ThreadPool& pool, int64_t products) {
  return [&pool, products](int64_t count, const std::function<void(int64_t)>& function) {
    const int64_t threads = products < kWorthThreads ? 1 : std::min<int64_t>(pool.num_threads(), count);
    if (threads <= 1) {
      for (int64_t i = 0; i < count; ++i) function(i);
      return;
    }
    const auto work = std::make_shared<Work>(count);
    work->function = &function;
    for (int64_t i = 1; i < threads; ++i) pool.Schedule([work] { work->run(); });
    work->run();
    work->wait();
  };
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
