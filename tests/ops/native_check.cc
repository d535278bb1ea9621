// Products and layers of random sizes by every kernel that this processor can run, on several threads, against sums in
// double precision. Without JAX, so that it can be compiled with sanitizers: see test_native.py. Prints what it ran.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "decode.h"
#include "team.h"

namespace {

std::mt19937 random_bits(0);

int below(int limit) { return static_cast<int>(random_bits() % static_cast<unsigned>(limit)); }

// A thread for each thing to do, which ends when it likes: some when the call that scheduled it is long over.
struct Threads {
  void Schedule(const std::function<void()>& function) { started->emplace_back(function); }

  std::vector<std::thread>* started;
};

// Loops shared by three threads.
class OnThreads {
 public:
  ~OnThreads() {
    team_.reset();
    for (std::thread& thread : started_) thread.join();
  }

  jint8::ForEach for_each() {
    return [this](int64_t count, const std::function<void(int64_t)>& function) { team_->run(count, function); };
  }

 private:
  std::vector<std::thread> started_;
  std::unique_ptr<jint8::Team<Threads>> team_ = std::make_unique<jint8::Team<Threads>>(Threads{&started_}, 3);
};

// Numbers of which the last one ends where its allocation ends, so that a sanitizer sees a read behind them.
std::vector<float> normals(int64_t count, float size = 1.0f) {
  std::normal_distribution<float> normal(0, size);
  std::vector<float> out(count);
  for (float& value : out) value = normal(random_bits);
  return out;
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
  OnThreads threads;
  jint8::product(arrays, options, kernels, threads.for_each());

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

// A weight of four bits, its columns in 16 bits and activations that are smoothed and rotated.
struct FourBits {
  FourBits(int64_t n, int64_t k) : groups((k + 63) / 64) {
    codes.resize(n * ((k + 1) / 2));
    for (uint8_t& two : codes) two = static_cast<uint8_t>(below(256));
    const auto halves = [](int64_t count) {
      std::vector<uint16_t> out(count);
      for (uint16_t& half : out) half = jint8::to_half(static_cast<float>(below(17) - 8) / 8);
      return out;
    };
    steps = halves(n * groups), least = halves(n * groups), scale = normals(n), bias = normals(n), smooth = normals(k);
    index = {static_cast<int32_t>(below(static_cast<int>(k))), static_cast<int32_t>(k), 0};
    columns = halves(n * 3);
    projection = jint8::Projection{};
    projection.n = n, projection.k = k, projection.codes = codes.data(), projection.group = 64;
    projection.scale = scale.data(), projection.bias = bias.data(), projection.smooth = smooth.data();
    projection.group_scale = steps.data(), projection.group_min = least.data(), projection.block = k % 4 ? 1 : 4;
    projection.columns = 3, projection.index = index.data(), projection.column_weights = columns.data();
  }

  // The weight's code of a channel's feature: blocks of two groups hold the first one's in their low bits.
  int code(int64_t c, int64_t i) const {
    const int64_t k = projection.k, block = i / 128 * 128, size = std::min<int64_t>(128, k - block);
    const int64_t half = size == 128 ? 64 : (size + 1) / 2, at = i - block;
    const uint8_t two = codes[c * ((k + 1) / 2) + block / 2 + (at < half ? at : at - half)];
    return at < half ? two & 15 : two >> 4;
  }

  int64_t groups;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> steps, least, columns;
  std::vector<float> scale, bias, smooth;
  std::vector<int32_t> index;
  jint8::Projection projection;
};

void check_four_bits(const jint8::Kernels& kernels) {
  const int64_t m = 1 + below(9), k = 1 + below(300), n = 1 + below(70);
  const FourBits w(n, k);
  const std::vector<float> x = normals(m * k);
  std::vector<float> y(m * n);
  {
    OnThreads threads;
    jint8::project(w.projection, m, x.data(), jint8::Options{}, kernels, threads.for_each(), y.data());
  }
  for (int64_t r = 0; r < m; ++r) {
    std::vector<double> row(k), taken(3);
    for (int64_t i = 0; i < k; ++i) row[i] = x[r * k + i];
    for (int i = 0; i < 3; ++i) taken[i] = w.index[i] < k ? row[w.index[i]] : 0.0;
    for (int i = 0; i < 3; ++i) {
      if (w.index[i] < k) row[w.index[i]] = 0;
    }
    for (int64_t i = 0; i < k; ++i) row[i] *= w.smooth[i];
    for (int64_t i = 0; i < k && w.projection.block == 4; i += 4) {
      const double a = row[i], b = row[i + 1], c = row[i + 2], d = row[i + 3];
      row[i] = (a + b + c + d) / 2, row[i + 1] = (a - b + c - d) / 2;
      row[i + 2] = (a + b - c - d) / 2, row[i + 3] = (a - b - c + d) / 2;
    }
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t g = c * w.groups + i / 64;
        const double weight = jint8::from_half(w.steps[g]) * double{1} * w.code(c, i) + jint8::from_half(w.least[g]);
        sum += row[i] * weight, size += std::fabs(row[i]) + 4 * std::fabs(weight) / 32512;
        size += std::fabs(row[i] * weight);
      }
      for (int i = 0; i < 3; ++i) sum += taken[i] * jint8::from_half(w.columns[c * 3 + i]);
      const double expected = sum * w.scale[c] + w.bias[c], bound = 1e-3 * (1 + size) * std::fabs(w.scale[c]) + 1e-5;
      if (!(std::fabs(y[r * n + c] - expected) <= bound)) {
        std::printf("%s, four bits: m=%ld n=%ld k=%ld row %ld channel %ld: expected %g within %g, got %g\n", kernels.name,
                    static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), static_cast<long>(r),
                    static_cast<long>(c), expected, bound, y[r * n + c]);
        std::exit(1);
      }
    }
  }
}

// A layer's arrays have the sizes that they should have, and rows don't depend on the rows beside them: what a layer
// computes is checked by tests/models/test_decode.py.
void check_layer(const jint8::Kernels& kernels) {
  const int64_t batch = 1 + below(6), heads = 1 + below(3), groups = 1 + below(5), size = 16 * (1 + below(3));
  const int64_t width = 1 + below(90), blocks = below(2) ? 2 : 0, hidden = 2 * (1 + below(40)), length = 1 + below(70);
  struct Weight {
    Weight(int64_t n, int64_t k) : q(n * k), scale(normals(n, 0.01f)), zero(n, 1.0f) {
      for (int8_t& value : q) value = static_cast<int8_t>(below(256) - 128);
      projection.n = n, projection.k = k, projection.q = q.data(), projection.scale = scale.data();
      projection.zero = zero.data(), projection.bias = scale.data();
    }

    std::vector<int8_t> q;
    std::vector<float> scale, zero;
    jint8::Projection projection{};
  };
  const Weight qkv(heads * (groups + 2) * size, width), out(width, heads * groups * size);
  const Weight up((blocks ? 2 : 1) * hidden, width), down(width, hidden);
  const std::vector<float> x = normals(batch * width), gain = normals(width), head_gain = normals(size);
  const std::vector<float> sin = normals(batch * size), cos = normals(batch * size);
  const std::vector<float> keys = normals(batch * heads * size * length), values = normals(batch * heads * size * length);
  const std::vector<float> slopes = normals(heads * groups);
  std::vector<int32_t> first(batch);
  const int64_t slot = below(static_cast<int>(length));
  for (int32_t& start : first) start = below(static_cast<int>(slot) + 1);

  const auto run = [&](int64_t begin, int64_t rows) {
    std::vector<float> key(keys.begin() + begin * heads * size * length, keys.begin() + (begin + rows) * heads * size * length);
    std::vector<float> value(values.begin() + begin * heads * size * length,
                             values.begin() + (begin + rows) * heads * size * length);
    std::vector<float> y(rows * width);
    jint8::Layer layer{};
    layer.batch = rows, layer.width = width, layer.x = x.data() + begin * width;
    const jint8::Norm norm{gain.data(), gain.data(), 1e-5f, 1.0f, true}, of_heads{head_gain.data(), nullptr, 1e-5f, 0, false};
    layer.attention_norm = layer.mlp_norm = layer.mlp_out_norm = norm;
    layer.q_norm = layer.k_norm = of_heads;
    layer.rotated = size, layer.sin = sin.data() + begin * size, layer.cos = cos.data() + begin * size;
    layer.query_scale = 0.3f;
    layer.attention = jint8::Attention{rows, heads, groups, size, length};
    layer.attention.key = key.data(), layer.attention.value = value.data(), layer.attention.slot = slot;
    layer.attention.change = jint8::ScoreChange{2.0f, slopes.data()};
    layer.attention.first = first.data() + begin, layer.attention.window = length / 2;
    layer.qkv = qkv.projection, layer.out = out.projection;
    layer.mlp = jint8::FeedForward{up.projection, down.projection, blocks, static_cast<jint8::Activation>(slot % 4)};
    layer.y = y.data();
    OnThreads threads;
    jint8::decode_layer(layer, jint8::Options{3.0f, false, false}, kernels, threads.for_each());
    return y;
  };
  const std::vector<float> all = run(0, batch);
  for (int64_t r = 0; r < batch; ++r) {
    const std::vector<float> alone = run(r, 1);
    for (int64_t i = 0; i < width; ++i) {
      if (!std::isfinite(alone[i]) || alone[i] != all[r * width + i]) {
        std::printf("%s: row %ld of %ld is another one than alone\n", kernels.name, static_cast<long>(r),
                    static_cast<long>(batch));
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
    for (int i = 0; i < 60; ++i) check_four_bits(*kernels);
    for (int i = 0; i < 60; ++i) check_layer(*kernels);
    std::printf("%s\n", name);
  }
}
