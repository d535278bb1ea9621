// Attention of one token: the queries that share a key-value head, and the slots of the cache that they see.
#ifndef JINT8_ATTENTION_H_
#define JINT8_ATTENTION_H_

#include "exponential.h"
#include "kernels.h"

namespace jint8 {
namespace {

// Vectors of scores, or of a value's features, that are computed at once: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif

// scores[g, s] = sum_d q[g, d] key[d, s], for V vectors of slots from s on.
template <int G, int V>
void scores_at(const float* q, const HeadCache& cache, int64_t s, float* scores, int64_t stride) {
  const int64_t size = cache.head_dim;
  const float* key = cache.key + s;
  Wide sums[G][V] = {};
  for (int64_t d = 0; d < size; ++d, key += cache.length) {
    Wide keys[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) keys[v] = read_wide(key + v * kWide);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[g][v] += q[g * size + d] * keys[v];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) write_wide(scores + g * stride + s + v * kWide, sums[g][v]);
  }
}

// The scores of slots `first` to `last`. Slots are next to each other: some vectors of them at a time. The last vector
// may do some slots again; fewer slots than a vector are done one by one.
template <int G>
void scores_of(const float* q, const HeadCache& cache, int64_t first, int64_t last, float* scores, int64_t stride) {
  const int64_t size = cache.head_dim, length = cache.length;
  if (last - first < kWide) {
    for (int g = 0; g < G; ++g) {
      for (int64_t s = first; s < last; ++s) {
        float sum = 0;
        for (int64_t d = 0; d < size; ++d) sum += q[g * size + d] * cache.key[d * length + s];
        scores[g * stride + s] = sum;
      }
    }
    return;
  }
  int64_t s = first;
  for (; s + kVectors * kWide <= last; s += kVectors * kWide) scores_at<G, kVectors>(q, cache, s, scores, stride);
  for (; s < last; s += kWide) scores_at<G, 1>(q, cache, s + kWide <= last ? s : last - kWide, scores, stride);
}

// The scores of one query, changed. What is behind the last one is overwritten.
inline void change_scores(float cap, float slope, int64_t first, int64_t last, float* scores) {
  for (int64_t s = first; s < last; s += kWide) {
    Wide v = read_wide(scores + s);
    if (cap > 0) v = cap * hyperbolic_tangent(v / cap);
    if (slope != 0) {
      for (int i = 0; i < kWide; ++i) v[i] += slope * static_cast<float>(s + i - (last - 1));
    }
    write_wide(scores + s, v);
  }
}

// Scores to exp(score - largest score); returns their sum. Scores behind the last one are overwritten.
inline float exponentials(float* scores, int64_t first, int64_t last) {
  float largest = -__builtin_inff();
  for (int64_t s = first; s < last; ++s) largest = scores[s] > largest ? scores[s] : largest;
  Wide sums{};
  for (int64_t s = first; s < last; s += kWide) {
    for (int64_t i = last; i < s + kWide; ++i) scores[i] = -__builtin_inff();
    const Wide powers = exponential(read_wide(scores + s) - largest);
    write_wide(scores + s, powers);
    sums += powers;
  }
  // What is behind the last score was taken for exp(-87.3), which is nothing beside the largest one's 1.
  float sum = 0;
  for (int i = 0; i < kWide; ++i) sum += sums[i];
  return sum;
}

// out[g, d] = sum_s weights[g, s] value[s, d] / sums[g], for V vectors of d.
template <int G, int V>
void weighted_of(const float* weights, int64_t stride, const float* sums, const HeadCache& cache, int64_t first,
                 int64_t last, int64_t d, float* out) {
  Wide v[G][V] = {};
  for (int64_t s = first; s < last; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const Wide values = read_wide(cache.value + s * cache.head_dim + d + i * kWide);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) v[g][i] += weights[g * stride + s] * values;
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int i = 0; i < V; ++i) write_wide(out + g * cache.head_dim + d + i * kWide, v[g][i] / sums[g]);
  }
}

template <int G>
void attend_of(const float* q, const HeadCache& cache, ScoreChange change, int64_t first, int64_t last, float* scores,
               int64_t stride, float* out) {
  scores_of<G>(q, cache, first, last, scores, stride);
  for (int g = 0; g < G && (change.cap > 0 || change.slopes); ++g) {
    change_scores(change.cap, change.slopes ? change.slopes[g] : 0.0f, first, last, scores + g * stride);
  }
  float sums[G];
  for (int g = 0; g < G; ++g) sums[g] = exponentials(scores + g * stride, first, last);
  int64_t d = 0;
  for (; d + kVectors * kWide <= cache.head_dim; d += kVectors * kWide) {
    weighted_of<G, kVectors>(scores, stride, sums, cache, first, last, d, out);
  }
  for (; d < cache.head_dim; d += kWide) weighted_of<G, 1>(scores, stride, sums, cache, first, last, d, out);
}

void attend(const float* q, int groups, const HeadCache& cache, ScoreChange change, int64_t first, int64_t last,
            float* scores, float* out) {
  const int64_t stride = cache.length + kAttendPadding;
  while (groups > 0) {
    int done;
    if (groups >= 4) {
      attend_of<4>(q, cache, change, first, last, scores, stride, out), done = 4;
    } else if (groups == 3) {
      attend_of<3>(q, cache, change, first, last, scores, stride, out), done = 3;
    } else if (groups == 2) {
      attend_of<2>(q, cache, change, first, last, scores, stride, out), done = 2;
    } else {
      attend_of<1>(q, cache, change, first, last, scores, stride, out), done = 1;
    }
    groups -= done, q += done * cache.head_dim, out += done * cache.head_dim;
    if (change.slopes) change.slopes += done;
  }
}

}  // namespace
}  // namespace jint8

#endif  // JINT8_ATTENTION_H_
