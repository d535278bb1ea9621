#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

namespace jint8 {
namespace {

constexpr int64_t kStep = 64;                // activations are allocated in whole steps of the widest kernel
constexpr int64_t kBlockBytes = 64 * 1024;   // of weights that all rows meet before the next ones: half of an L2 cache
constexpr int64_t kRowBytes = 64 * 1024;     // of activations that one thread rounds at a time
constexpr uint32_t kInfinityBits = 0x7f800000u;

// The rows as integers, and the outliers that were taken out of them.
struct Rows {
  int64_t stride;                        // values from one row to the next
  std::unique_ptr<std::byte[]> values;   // of type `Kernels::Value`
  std::vector<RowInfo> info;
  std::vector<int32_t> zeros;
  std::vector<int32_t> columns;          // that hold outliers, in order
  std::vector<float> outliers;           // [m, columns]: 0 for what isn't one
  std::vector<double> outlier_sums;      // [m]
};

bool is_outlier(float value, uint32_t limit) {
  const uint32_t bits = bits_of_float(value) & 0x7fffffffu;
  return bits >= limit && bits <= kInfinityBits;  // NaN is none
}

// Marks the columns in which a row has outliers. Several threads may mark at once: all write the same value.
void mark_outliers(const float* x, int64_t k, uint32_t limit, std::atomic<uint8_t>* marks) {
  for (int64_t start = 0; start < k; start += kStep) {
    const int64_t end = std::min(start + kStep, k);
    uint32_t largest = 0;  // most steps have none, which this loop without branches sees
    for (int64_t i = start; i < end; ++i) largest = std::max(largest, bits_of_float(x[i]) & 0x7fffffffu);
    if (largest < limit) continue;
    for (int64_t i = start; i < end; ++i) {
      if (is_outlier(x[i], limit)) marks[i].store(1, std::memory_order_relaxed);
    }
  }
}

Rows round_rows(const Arrays& a, const Options& options, const Kernels& kernels, const ForEach& for_each) {
  Rows rows;
  rows.stride = (a.k + kStep - 1) / kStep * kStep;
  rows.values.reset(new std::byte[a.m * rows.stride * kernels.bytes_per_value]());
  rows.info.resize(a.m);
  rows.zeros.resize(a.m);
  const bool decomposes = options.threshold > 0;
  const uint32_t limit = bits_of_float(options.threshold);
  const int64_t some = std::max<int64_t>(1, kRowBytes / (4 * std::max<int64_t>(a.k, 1)));
  const int64_t pieces = (a.m + some - 1) / some;
  const auto each_row = [&](const std::function<void(int64_t, float*)>& function) {
    for_each(pieces, [&](int64_t piece) {
      std::vector<float> row(a.k);
      for (int64_t r = piece * some; r < std::min(a.m, (piece + 1) * some); ++r) {
        read_floats(a.x, a.x_type, r * a.k, a.k, row.data());
        function(r, row.data());
      }
    });
  };
  if (decomposes) {
    const std::unique_ptr<std::atomic<uint8_t>[]> marks(new std::atomic<uint8_t>[a.k]());
    each_row([&](int64_t, float* x) { mark_outliers(x, a.k, limit, marks.get()); });
    for (int64_t i = 0; i < a.k; ++i) {
      if (marks[i].load(std::memory_order_relaxed)) rows.columns.push_back(static_cast<int32_t>(i));
    }
    rows.outliers.resize(a.m * rows.columns.size());
    rows.outlier_sums.resize(a.m);
  }
  each_row([&](int64_t r, float* x) {
    float* outlier = rows.outliers.data() + r * rows.columns.size();
    double sum = 0;
    for (const int32_t column : rows.columns) {
      const bool taken = options.by_column || is_outlier(x[column], limit);
      *outlier = taken ? x[column] : 0.0f;
      sum += *outlier++;
      if (taken) x[column] = 0.0f;
    }
    if (decomposes) rows.outlier_sums[r] = sum;
    void* values = rows.values.get() + r * rows.stride * kernels.bytes_per_value;
    rows.info[r] = kernels.quantize(x, a.k, Rounding{options.affine}, values);
    rows.zeros[r] = rows.info[r].zero;
  });
  return rows;
}

// All rows times channels `start` to `end`.
void multiply(const Arrays& a, const Rows& rows, const Kernels& kernels, int64_t start, int64_t end) {
  const int64_t channels = end - start, columns = static_cast<int64_t>(rows.columns.size());
  // The weights of the outlier columns, with channels next to each other.
  std::vector<float> weights(columns * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const int8_t* q = a.q + (start + c) * a.k;
    for (int64_t i = 0; i < columns; ++i) weights[i * channels + c] = q[rows.columns[i]];
  }
  std::vector<int32_t> sums(kernels.rows * kMaxChannels);
  std::vector<double> outlier_products(channels * kernels.rows);
  for (int64_t r = 0; r < a.m; r += kernels.rows) {
    const int count = static_cast<int>(std::min<int64_t>(kernels.rows, a.m - r));
    std::fill(outlier_products.begin(), outlier_products.end(), 0.0);
    for (int i = 0; i < count; ++i) {
      const float* outliers = rows.outliers.data() + (r + i) * columns;
      for (int64_t o = 0; o < columns; ++o) {
        if (outliers[o] == 0) continue;  // adding zeros would change nothing
        kernels.add_scaled(outliers[o], &weights[o * channels], static_cast<int>(channels),
                           &outlier_products[i * channels]);
      }
    }
    for (int64_t c = 0; c < channels; c += kMaxChannels) {
      const int width = static_cast<int>(std::min<int64_t>(kMaxChannels, channels - c));
      kernels.dots(rows.values.get() + r * rows.stride * kernels.bytes_per_value, rows.stride, count, &rows.zeros[r],
                   a.q + (start + c) * a.k, a.k, width, sums.data());
      for (int i = 0; i < count; ++i) {
        const RowInfo& row = rows.info[r + i];
        for (int j = 0; j < width; ++j) {
          const int64_t channel = start + c + j;
          float regular = static_cast<float>(sums[i * kMaxChannels + j]);
          double outliers = outlier_products[i * channels + c + j];
          if (a.zero) {
            regular -= static_cast<float>(row.sum) * a.zero[channel];
            if (columns > 0) outliers -= rows.outlier_sums[r + i] * double{a.zero[channel]};
          }
          float y = (regular * row.scale + static_cast<float>(outliers)) * a.scale[channel];
          if (a.bias) y += a.bias[channel];
          write_float(a.y, a.y_type, (r + i) * a.n + channel, y);
        }
      }
    }
  }
}

bool has(const char* feature) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (!std::strcmp(feature, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(JINT8_HAS_AVXVNNI)
  if (!std::strcmp(feature, "avx-vnni")) return __builtin_cpu_supports("avxvnni");
#endif
  if (!std::strcmp(feature, "avx512-vnni")) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return !std::strcmp(feature, "generic") || !std::strcmp(feature, "neon-dotprod");
}

}  // namespace

const Kernels* choose_kernels(const char* name) {
  const Kernels* known[] = {  // the best first
#if defined(JINT8_HAS_AVX512VNNI)
      avx512vnni_kernels(),
#endif
#if defined(JINT8_HAS_AVXVNNI)
      avxvnni_kernels(),
#endif
#if defined(JINT8_HAS_AVX2)
      avx2_kernels(),
#endif
#if defined(JINT8_HAS_NEON)
      neon_kernels(),
#endif
      generic_kernels(),
  };
  for (const Kernels* kernels : known) {
    if ((!name || !std::strcmp(name, kernels->name)) && has(kernels->name)) return kernels;
  }
  return nullptr;
}

void product(const Arrays& arrays, const Options& options, const Kernels& kernels, const ForEach& for_each) {
  const Rows rows = round_rows(arrays, options, kernels, for_each);
  const int64_t fit = kBlockBytes / std::max<int64_t>(arrays.k, 1) / kMaxChannels * kMaxChannels;
  const int64_t channels = std::min<int64_t>(std::max<int64_t>(fit, kMaxChannels), 64);
  for_each((arrays.n + channels - 1) / channels, [&](int64_t block) {
    multiply(arrays, rows, kernels, block * channels, std::min(arrays.n, (block + 1) * channels));
  });
}

}  // namespace jint8
