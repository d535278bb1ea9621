#include "projection.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace jint8 {
namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kChannelsOfTask = 32;

int64_t in_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Activations in a weight's coordinates, and the columns that were taken out of them.
struct Inside {
  std::unique_ptr<float[]> rows;  // [m, k]
  int64_t stride;                 // `columns` in whole vectors
  std::vector<float> taken;       // [m, stride]
};

// One row into the weight's coordinates.
void enter(const Projection& p, const Kernels& kernels, float* row, float* taken) {
  const auto in_use = [&](int64_t i) { return p.index[i] >= 0 && p.index[i] < p.k; };
  for (int64_t i = 0; i < p.columns; ++i) taken[i] = in_use(i) ? row[p.index[i]] : 0.0f;
  for (int64_t i = 0; i < p.columns; ++i) {
    if (in_use(i)) row[p.index[i]] = 0.0f;
  }
  if (p.smooth) {
    for (int64_t i = 0; i < p.k; ++i) row[i] *= p.smooth[i];
  }
  if (p.block > 1) kernels.rotate(row, p.k, p.block);
}

Inside enter_rows(const Projection& p, int64_t m, const float* x, const Kernels& kernels, const ForEach& for_each) {
  const int64_t stride = in_vectors(p.columns);
  Inside inside{std::unique_ptr<float[]>(new float[m * p.k]), stride, std::vector<float>(m * stride)};
  for_each(m, [&](int64_t r) {
    float* row = inside.rows.get() + r * p.k;
    std::memcpy(row, x + r * p.k, p.k * sizeof(float));
    enter(p, kernels, row, inside.taken.data() + r * stride);
  });
  return inside;
}

// Adds the columns in 16 bits to some channels of the result.
void add_columns(const Projection& p, int64_t m, const Inside& x, int64_t start, int64_t end, const Kernels& kernels,
                 float* y) {
  std::vector<float> weights(x.stride);
  for (int64_t c = start; c < end; ++c) {
    kernels.read_halves(p.column_weights + c * p.columns, p.columns, weights.data());
    for (int64_t r = 0; r < m; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < p.columns; ++i) sum += x.taken[r * x.stride + i] * weights[i];
      y[r * p.n + c] += sum * p.scale[c];
    }
  }
}

// Rows as integers of two digits, as `Kernels::round_groups` writes them.
struct Digits {
  int64_t stride, group_stride;
  std::unique_ptr<int8_t[]> digits;  // [m, stride]
  std::vector<float> units, sums;    // [m, group_stride]
};

Digits round_rows(const Projection& p, int64_t m, const float* rows, const Kernels& kernels, const ForEach& for_each) {
  const int64_t groups = (p.k + p.group - 1) / p.group, stride = 2 * groups * p.group, padded = in_vectors(groups);
  Digits out{stride, padded, std::unique_ptr<int8_t[]>(new int8_t[m * stride]), std::vector<float>(m * padded),
             std::vector<float>(m * padded)};
  for_each(m, [&](int64_t r) {
    kernels.round_groups(rows + r * p.k, p.k, p.group, out.digits.get() + r * stride, &out.units[r * padded],
                         &out.sums[r * padded]);
  });
  return out;
}

// Some channels of the products with codes.
void multiply_codes(const Projection& p, int64_t m, const Inside& inside, const Digits& x, int64_t start, int64_t end,
                    const Kernels& kernels, float* y) {
  const int64_t bytes = (p.k + 1) / 2, groups = (p.k + p.group - 1) / p.group;
  for (int64_t c = start; c < end; c += kDotChannels) {
    const int channels = static_cast<int>(std::min<int64_t>(kDotChannels, end - c));
    for (int64_t first = 0; first < m; first += kRowsAtOnce) {
      const CodeRows rows{static_cast<int>(std::min(kRowsAtOnce, m - first)), p.k, p.group,
                          x.digits.get() + first * x.stride, x.stride, x.group_stride,
                          &x.units[first * x.group_stride], &x.sums[first * x.group_stride], p.columns,
                          inside.taken.data() + first * inside.stride, inside.stride};
      float out[kRowsAtOnce * kDotChannels];
      const CodeWeights weights{p.codes + c * bytes, p.group_scale + c * groups, p.group_min + c * groups,
                                p.column_weights + c * p.columns};
      kernels.multiply_codes(rows, weights, channels, out);
      for (int r = 0; r < rows.count; ++r) {
        for (int i = 0; i < channels; ++i) {
          const float bias = p.bias ? p.bias[c + i] : 0.0f;
          y[(first + r) * p.n + c + i] = out[r * kDotChannels + i] * p.scale[c + i] + bias;
        }
      }
    }
  }
}

}  // namespace

bool in_range(const Projection& p, bool affine) {
  if (p.k < 0 || p.n < 0 || p.block < 0 || (p.block > 1 && p.k % p.block != 0)) return false;
  if (!p.codes) return p.k <= most_features(affine);
  return p.group > 0 && p.group % kCodes == 0 && p.group <= kMaxGroup && p.k <= kMaxGroups * p.group;
}

void project(const Projection& p, int64_t m, const float* x, const Options& options, const Kernels& kernels,
             const ForEach& for_each, float* y) {
  const bool apart = p.smooth || p.block > 1 || p.columns > 0;
  const Inside inside = apart ? enter_rows(p, m, x, kernels, for_each) : Inside{};
  const float* const rows = apart ? inside.rows.get() : x;
  const auto on_channels = [&](const auto& function) {
    for_each((p.n + kChannelsOfTask - 1) / kChannelsOfTask, [&](int64_t task) {
      const int64_t start = task * kChannelsOfTask;
      function(start, std::min(p.n, start + kChannelsOfTask));
    });
  };
  if (p.codes) {
    const Digits digits = round_rows(p, m, rows, kernels, for_each);
    on_channels([&](int64_t start, int64_t end) { multiply_codes(p, m, inside, digits, start, end, kernels, y); });
    return;
  }
  // A rotated weight has no outliers but the columns that were taken out.
  const Options own{p.smooth ? 0.0f : options.threshold, options.by_column, options.affine};
  const Arrays arrays{m, p.n, p.k, rows, Float::kF32, p.q, p.scale, p.zero, p.bias, y, Float::kF32};
  product(arrays, own, kernels, for_each);
  if (p.columns == 0) return;
  on_channels([&](int64_t start, int64_t end) { add_columns(p, m, inside, start, end, kernels, y); });
}

}  // namespace jint8
