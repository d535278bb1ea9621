// Loops that several threads share.
#ifndef JINT8_TEAM_H_
#define JINT8_TEAM_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

namespace jint8 {

constexpr int kPauses = 500;  // some 20 to 40 microseconds, before a waiting thread lets others run

// Waits for what another thread is about to do.
template <typename Condition>
void wait_until(const Condition& condition) {
  for (int i = 0; !condition(); ++i) {
    if (i >= kPauses) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
}

// A loop whose iterations threads take, one after the other, and the loop that comes after it.
struct Loop {
  void run() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      (*function)(i);
      ended.fetch_add(1);
    }
  }

  int64_t count = 0;
  const std::function<void(int64_t)>* function = nullptr;  // alive until all iterations have ended
  std::atomic<int64_t> next{0}, ended{0};
  std::atomic<Loop*> following{nullptr};
};

// The loops of one call, which the thread that begins them shares with others of XLA's pool. Those are woken once, with
// the first loop: waking a thread takes longer than many a loop does. Between two loops they wait awake, no longer than
// the call goes on. The one that began never waits for iterations that no thread has taken, so the call ends although
// all threads of the pool may be in calls like this.
//
// A `Pool` has `Schedule`, for what one of its threads is to do.
template <typename Pool>
class Team {
 public:
  Team(Pool pool, int64_t threads) : pool_(pool), threads_(threads) {}

  ~Team() { shared_->over.store(true); }

  void run(int64_t count, const std::function<void(int64_t)>& function) {
    if (threads_ <= 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) function(i);
      return;
    }
    Loop& loop = shared_->loops.emplace_back();
    loop.count = count, loop.function = &function;
    last_->following.store(&loop);
    last_ = &loop;
    for (; woken_ < std::min(threads_, count); ++woken_) {
      pool_.Schedule([shared = shared_] { shared->help(); });
    }
    loop.run();
    wait_until([&] { return loop.ended.load() == count; });
  }

 private:
  // What the threads hold: one that wakes late, when the call has ended, finds that nothing is left.
  struct Shared {
    void help() {
      for (Loop* loop = &begin;;) {
        Loop* following = nullptr;
        wait_until([&] { return (following = loop->following.load()) || over.load(); });
        if (!following) return;
        loop = following;
        loop->run();
      }
    }

    Loop begin;
    std::deque<Loop> loops;  // which stay where they are; only the thread that began looks into the deque
    std::atomic<bool> over{false};
  };

  Pool pool_;
  const int64_t threads_;
  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  Loop* last_ = &shared_->begin;
  int64_t woken_ = 1;
};

}  // namespace jint8

#endif  // JINT8_TEAM_H_
