#include "product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(JINT8_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jint8 {
namespace {

constexpr int64_t kTaskBytes = 64 * 1024;    // of weights that one task reads
constexpr int64_t kTaskChannels = 64;        // at most
constexpr int64_t kRowBytes = 64 * 1024;     // of activations that one task rounds
constexpr int64_t kCacheBytes = 768 * 1024;  // of rounded rows that meet all weights before the next ones: they stay in
                                             // an L2 cache

// The rows as integers, and the outliers that were taken out of them.
struct Rows {
  bool packed;                          // for `Kernels::tile`, in blocks; else for `Kernels::dots`
  int64_t stride;                       // values from one row to the next
  std::unique_ptr<std::byte[]> values;  // of type `Kernels::Value`
  std::vector<RowInfo> info;
  std::vector<int32_t> zeros;
  std::vector<int32_t> columns;         // that hold outliers, in order
  std::vector<float> outliers;          // [m, columns]: 0 for what isn't one
  std::vector<double> outlier_sums;     // [m]
};

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

bool is_outlier(float value, uint32_t limit) {
  const uint32_t bits = bits_of_float(value) & 0x7fffffffu;
  return bits >= limit && bits <= 0x7f800000u;  // NaN is none
}

// The columns in which a row has outliers, in order.
std::vector<int32_t> outlier_columns(const Arrays& a, uint32_t limit, const Kernels& kernels, const ForEach& for_each,
                                     int64_t rows_per_task) {
  std::vector<uint8_t> marks(a.k);
  for_each((a.m + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    std::vector<float> row(a.k);
    for (int64_t r = task * rows_per_task; r < std::min(a.m, (task + 1) * rows_per_task); ++r) {
      kernels.mark_outliers(read_row(a.x, a.x_type, r * a.k, a.k, row.data()), a.k, limit, marks.data());
    }
  });
  std::vector<int32_t> columns;
  for (int64_t i = 0; i < a.k; ++i) {
    if (marks[i]) columns.push_back(static_cast<int32_t>(i));
  }
  return columns;
}

Rows round_rows(const Arrays& a, const Options& options, const Kernels& kernels, const ForEach& for_each) {
  Rows rows;
  rows.packed = a.m > kernels.few_rows;
  rows.stride = round_up(a.k, kStep);
  const int64_t lanes = rows.packed ? kernels.lanes : 1, count = round_up(a.m, lanes);
  const int64_t row_bytes = rows.stride * kernels.bytes_per_value;
  rows.values.reset(new std::byte[count * row_bytes]);
  rows.info.resize(a.m);
  rows.zeros.resize(round_up(count, 2 * lanes));
  const bool decomposes = options.threshold > 0;
  const uint32_t limit = bits_of_float(options.threshold);
  const int64_t some = round_up(std::max<int64_t>(1, kRowBytes / (4 * std::max<int64_t>(a.k, 1))), lanes);
  if (decomposes) {
    rows.columns = outlier_columns(a, limit, kernels, for_each, some);
    rows.outliers.resize(a.m * rows.columns.size());
    rows.outlier_sums.resize(a.m);
  }
  const auto round = [&](int64_t r, float* x, std::byte* values) {
    read_floats(a.x, a.x_type, r * a.k, a.k, x);
    float* outlier = rows.outliers.data() + r * rows.columns.size();
    double sum = 0;
    for (const int32_t column : rows.columns) {
      const bool taken = options.by_column || is_outlier(x[column], limit);
      *outlier = taken ? x[column] : 0.0f;
      sum += *outlier++;
      if (taken) x[column] = 0.0f;
    }
    if (decomposes) rows.outlier_sums[r] = sum;
    rows.info[r] = kernels.quantize(x, a.k, Rounding{options.affine}, values);
    rows.zeros[r] = rows.info[r].zero;
    const int64_t used = a.k * kernels.bytes_per_value;
    std::memset(values + used, 0, row_bytes - used);
  };
  for_each((count + some - 1) / some, [&](int64_t task) {
    std::vector<float> row(a.k);
    std::vector<std::byte> block(rows.packed ? lanes * row_bytes : 0);
    for (int64_t start = task * some; start < std::min(count, (task + 1) * some); start += lanes) {
      const int64_t exist = std::min(lanes, a.m - start);
      std::byte* values = rows.values.get() + start * row_bytes;
      for (int64_t r = 0; r < exist; ++r) {
        round(start + r, row.data(), rows.packed ? block.data() + r * row_bytes : values);
      }
      if (rows.packed) kernels.pack(block.data(), rows.stride, static_cast<int>(exist), values);
    }
  });
  return rows;
}

// Some channels of the result, computed from the sums of a few rows.
class Writer {
 public:
  Writer(const Arrays& arrays, const Rows& rows, const Kernels& kernels)
      : a_(arrays), rows_(rows), kernels_(kernels), columns_(static_cast<int64_t>(rows.columns.size())),
        weights_(columns_ * kernels.strip) {}

  // Goes on to the strip of `count` channels that begins with `start`.
  void begin_strip(int64_t start, int count) {
    start_ = start, count_ = count;
    channels_ = Channels{};
    channels_.has_zero = a_.zero, channels_.has_bias = a_.bias;
    std::copy_n(a_.scale + start, count, channels_.scale);
    if (a_.zero) std::copy_n(a_.zero + start, count, channels_.zero);
    if (a_.bias) std::copy_n(a_.bias + start, count, channels_.bias);
    for (int c = 0; c < count && columns_ > 0; ++c) {
      const int8_t* q = a_.q + (start + c) * a_.k;
      for (int64_t i = 0; i < columns_; ++i) weights_[i * kernels_.strip + c] = q[rows_.columns[i]];
    }
  }

  // Writes rows `first` to `first + rows` of the strip's channels.
  void write(const int32_t* sums, int64_t first, int64_t rows) const {
    const Outliers outliers{columns_, rows_.outliers.data() + first * columns_, rows_.outlier_sums.data() + first,
                            weights_.data()};
    const bool direct = a_.y_type == Float::kF32 && count_ == kernels_.strip;
    alignas(64) float buffer[kMaxTileRows * kMaxStrip];
    float* y = direct ? static_cast<float*>(a_.y) + first * a_.n + start_ : buffer;
    kernels_.finish(sums, static_cast<int>(rows), &rows_.info[first], outliers, channels_, y,
                    direct ? a_.n : kernels_.strip);
    for (int64_t r = 0; r < rows && !direct; ++r) {
      for (int c = 0; c < count_; ++c) {
        write_float(a_.y, a_.y_type, (first + r) * a_.n + start_ + c, buffer[r * kernels_.strip + c]);
      }
    }
  }

 private:
  const Arrays& a_;
  const Rows& rows_;
  const Kernels& kernels_;
  const int64_t columns_;
  std::vector<float> weights_;  // [columns, strip]: of outlier columns, with channels next to each other
  Channels channels_;
  int64_t start_ = 0;
  int count_ = 0;
};

// Few rows times channels `start` to `end`.
void multiply_few(const Arrays& a, const Rows& rows, const Kernels& kernels, int64_t start, int64_t end) {
  Writer writer(a, rows, kernels);
  int32_t sums[kDotRows * kMaxStrip], some[kDotRows * kDotChannels];
  for (int64_t strip = start; strip < end; strip += kernels.strip) {
    const int channels = static_cast<int>(std::min<int64_t>(kernels.strip, end - strip));
    for (int64_t r = 0; r < a.m; r += kernels.dot_rows) {
      const int count = static_cast<int>(std::min<int64_t>(kernels.dot_rows, a.m - r));
      for (int c = 0; c < channels; c += kDotChannels) {
        const int width = std::min(kDotChannels, channels - c);
        kernels.dots(rows.values.get() + r * rows.stride * kernels.bytes_per_value, rows.stride, count, &rows.zeros[r],
                     a.q + (strip + c) * a.k, a.k, width, some);
        for (int i = 0; i < count; ++i) {
          for (int j = 0; j < width; ++j) sums[i * kernels.strip + c + j] = some[i * kDotChannels + j];
        }
      }
      if (r == 0) writer.begin_strip(strip, channels);  // now the weights are in the cache
      writer.write(sums, r, count);
    }
  }
}

// Packed rows `first` to `last` times channels `start` to `end`.
void multiply_packed(const Arrays& a, const Options& options, const Rows& rows, const Kernels& kernels, int64_t first,
                     int64_t last, int64_t start, int64_t end) {
  Writer writer(a, rows, kernels);
  alignas(64) int32_t sums[kMaxTileRows * kMaxStrip];
  const std::unique_ptr<std::byte[]> scratch(new std::byte[kernels.strip * kernels.strip_bytes(a.k)]);
  kernels.begin();
  for (int64_t c = start; c < end; c += kernels.strip) {
    const int channels = static_cast<int>(std::min<int64_t>(kernels.strip, end - c));
    Strip strip;
    kernels.load_strip(a.q + c * a.k, a.k, channels, options.affine, scratch.get(), &strip);
    for (int64_t r = first; r < last; r += 2 * kernels.lanes) {
      const int64_t count = std::min<int64_t>(2 * kernels.lanes, last - r);
      kernels.tile(rows.values.get() + r * rows.stride * kernels.bytes_per_value, rows.stride,
                   count > kernels.lanes ? 2 : 1, &rows.zeros[r], strip, sums);
      if (r == first) writer.begin_strip(c, channels);  // now the weights are in the cache
      writer.write(sums, r, count);
    }
  }
  kernels.end();
}

#if defined(JINT8_HAS_AMX)
// Asks the system for the tiles' registers, for all threads of the process.
bool may_use_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
  return known && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

bool has(const char* feature) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(feature, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#if defined(JINT8_HAS_AVXVNNI)
  if (!std::strcmp(feature, "avx-vnni")) return __builtin_cpu_supports("avxvnni");
#endif
  if (!std::strcmp(feature, "avx512-vnni")) return avx512;
#if defined(JINT8_HAS_AMX)
  if (!std::strcmp(feature, "amx-int8")) return avx512 && may_use_tiles();
#endif
#endif
  return !std::strcmp(feature, "generic") || !std::strcmp(feature, "neon-dotprod");
}

}  // namespace

const Kernels* choose_kernels(const char* name) {
  const Kernels* known[] = {  // the best first
#if defined(JINT8_HAS_AMX)
      amx_kernels(),
#endif
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

const Kernels* chosen_kernels() {
  static const Kernels* const kernels = choose_kernels(std::getenv("JINT8_CPU_KERNELS"));
  return kernels;
}

void product(const Arrays& arrays, const Options& options, const Kernels& kernels, const ForEach& for_each) {
  const Rows rows = round_rows(arrays, options, kernels, for_each);
  const int64_t fit = kTaskBytes / std::max<int64_t>(arrays.k, 1) / kernels.strip * kernels.strip;
  const int64_t channels = std::clamp<int64_t>(fit, kernels.strip, kTaskChannels), n = arrays.n;
  const int64_t tasks = (n + channels - 1) / channels;
  if (!rows.packed) {
    for_each(tasks, [&](int64_t task) {
      multiply_few(arrays, rows, kernels, task * channels, std::min(n, (task + 1) * channels));
    });
    return;
  }
  const int64_t some = std::max<int64_t>(1, kCacheBytes / (2 * kernels.lanes * rows.stride * kernels.bytes_per_value)) *
                       2 * kernels.lanes;
  for (int64_t first = 0; first < arrays.m; first += some) {
    for_each(tasks, [&](int64_t task) {
      multiply_packed(arrays, options, rows, kernels, first, std::min(arrays.m, first + some), task * channels,
                      std::min(n, (task + 1) * channels));
    });
  }
}

}  // namespace jint8
