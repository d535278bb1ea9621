// Products of random sizes by every kernel that this processor can run, on two threads, against sums in double
// precision. Without JAX, so that it can be compiled with sanitizers: see test_native.py. Prints what it ran.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "product.h"

namespace {

std::mt19937 random_bits(0);

int below(int limit) { return static_cast<int>(random_bits() % static_cast<unsigned>(limit)); }

void on_two_threads(int64_t count, const std::function<void(int64_t)>& function) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) function(i);
  };
  std::thread other(run);
  run();
  other.join();
}

// Arrays end where their allocation ends, so that a sanitizer sees a read behind them.
void check(const jint8::Kernels& kernels) {
  const int64_t m = 1 + below(14), k = 1 + below(200), n = 1 + below(140);
  std::normal_distribution<float> normal;
  std::vector<float> x(m * k), scale(n), zero(n), bias(n), y(m * n);
  std::vector<int8_t> q(n * k);
  for (float& value : x) value = below(50) ? normal(random_bits) : 20 * normal(random_bits);
  for (int8_t& value : q) value = static_cast<int8_t>(below(256) - 128);
  for (int64_t i = 0; i < n; ++i) {
    scale[i] = 0.5f + static_cast<float>(below(8)), zero[i] = static_cast<float>(below(9) - 4), bias[i] = normal(random_bits);
  }
  const bool has_zero = below(2), has_bias = below(2);
  const jint8::Options options{below(2) ? 6.0f : 0.0f, below(2) == 0, below(2) == 0};
  const jint8::Arrays arrays{m, n, k, x.data(), jint8::Float::kF32, q.data(), scale.data(),
                             has_zero ? zero.data() : nullptr, has_bias ? bias.data() : nullptr, y.data(),
                             jint8::Float::kF32};
  jint8::product(arrays, options, kernels, on_two_threads);

  std::vector<bool> column(k, false);
  const auto over = [&](int64_t r, int64_t i) { return options.threshold > 0 && std::fabs(x[r * k + i]) >= options.threshold; };
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; ++i) column[i] = column[i] || over(r, i);
  }
  for (int64_t r = 0; r < m; ++r) {
    const auto outlier = [&](int64_t i) { return options.by_column ? bool{column[i]} : over(r, i); };
    double high = 0, low = 0;
    for (int64_t i = 0; i < k; ++i) {
      if (outlier(i)) continue;
      high = std::fmax(high, x[r * k + i]), low = std::fmin(low, x[r * k + i]);
    }
    const double step = options.affine ? (high - low) / 255 : std::fmax(high, -low) / 127;
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, weights = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double w = q[c * k + i] - (has_zero ? zero[c] : 0);
        sum += x[r * k + i] * w;
        size += std::fabs(x[r * k + i] * w);
        if (!outlier(i)) weights += std::fabs(w);
      }
      // A rounded activation is off by half a step, or by a whole one where its zero point is rounded, too.
      const double bound = scale[c] * (weights * step * (options.affine ? 1.01 : 0.501) + 1e-5 * size) + 1e-5;
      const double expected = sum * scale[c] + (has_bias ? bias[c] : 0);
      if (!(std::fabs(y[r * n + c] - expected) <= bound)) {
        std::printf("%s: m=%ld n=%ld k=%ld row %ld channel %ld: expected %g within %g, got %g\n", kernels.name,
                    static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), static_cast<long>(r),
                    static_cast<long>(c), expected, bound, y[r * n + c]);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  for (const char* name : {"generic", "avx2", "avx-vnni", "avx512-vnni", "amx-int8", "neon-dotprod"}) {
    const jint8::Kernels* kernels = jint8::choose_kernels(name);
    if (!kernels) continue;
    for (int i = 0; i < 300; ++i) check(*kernels);
    std::printf("%s\n", name);
  }
}
