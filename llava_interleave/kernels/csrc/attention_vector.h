// Attention of some queries by vector registers.

#pragma once

#include <cmath>
#include <limits>

#include "kv_cache.h"

namespace {

// c[m][0..16 N) = sum over k of a[m][k] * b[k][0..16 N), K_STEP k at a time and in order for every
// M and N: batch-invariant. b has `depth` rows, a has columns up to a multiple of K_STEP; b has
// `have` columns where N is 1. Memory is prefetched `prefetch_distance` before its use.
template <int M, int N, class S>
void gemm_panels(const Lhs* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth,
                 int64_t have, int64_t prefetch_distance, float* c, int64_t c_stride) {
  static const S zeros[N * PANEL] = {};
  Floats sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sum[m][n] = splat(0);
  }
  for (int64_t k = 0; k < depth; k += K_STEP, a += K_STEP, b += K_STEP * b_stride) {
    const S* other = k + 1 < depth ? b + b_stride : zeros;
    KVector some[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) some[n] = load_k(b + n * PANEL, other + n * PANEL, have);
    for (size_t line = 0; line < N * PANEL * sizeof(S); line += 64) {
      prefetch(reinterpret_cast<const char*>(b + prefetch_distance) + line);
      if (K_STEP == 2) prefetch(reinterpret_cast<const char*>(other + prefetch_distance) + line);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) dot(sum[m][n], some[n], a + m * a_stride);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) store(c + m * c_stride + n * PANEL, sum[m][n]);
  }
}

// Panels of columns per pass that fit the registers with so many rows.
constexpr int panels_per_pass(int rows) {
  int n = 1;
  while (2 * n * rows <= ACCUMULATORS && n < 8) n *= 2;
  return n;
}

// The same for any number of columns, widest panels first. Rows of c are padded to whole panels.
template <int M, int N, class S>
void gemm_columns(const Lhs* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth,
                  int64_t columns, bool down, float* c, int64_t c_stride) {
  const int64_t prefetch_distance =
      down ? 4096 / sizeof(S) : N * PANEL;  // next come further rows, or the next columns
  int64_t i = 0;
  for (; i + N * PANEL <= columns; i += N * PANEL) {
    gemm_panels<M, N>(a, a_stride, b + i, b_stride, depth, PANEL, prefetch_distance, c + i,
                      c_stride);
  }
  if constexpr (N > 1) {
    gemm_columns<M, N / 2>(a, a_stride, b + i, b_stride, depth, columns - i, down, c + i, c_stride);
  } else if (i < columns) {
    gemm_panels<M, 1>(a, a_stride, b + i, b_stride, depth, columns - i, prefetch_distance, c + i,
                      c_stride);
  }
}

// The same for one row of a and long rows of b: eight rows at a time, each from end to end.
template <class S>
void gemv_rows(const Lhs* a, const S* b, int64_t b_stride, int64_t depth, int64_t columns,
               float* c) {
  for (int64_t k = 0; k < depth; k += 8, a += 8, b += 8 * b_stride) {
    const int64_t some = std::min<int64_t>(8, depth - k);
    for (int64_t i = 0; i < columns; i += PANEL) {
      const int64_t have = std::min(PANEL, columns - i);
      Floats sum = k ? load(c + i) : splat(0);
      for (int64_t j = 0; j < some; j += K_STEP)
        dot(sum, load_k(b + j * b_stride + i, b + (j + 1) * b_stride + i, have), a + j);
      store(c + i, sum);
    }
  }
}

template <class S, int M = MAX_QUERIES>
void gemm(int64_t rows, const Lhs* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth,
          int64_t columns, bool down, float* c, int64_t c_stride) {
  if (rows == 1 && !down) return gemv_rows(a, b, b_stride, depth, columns, c);
  if (rows == M)
    return gemm_columns<M, panels_per_pass(M)>(a, a_stride, b, b_stride, depth, columns, down, c,
                                               c_stride);
  if constexpr (M > 1)
    gemm<S, M - 1>(rows, a, a_stride, b, b_stride, depth, columns, down, c, c_stride);
}

// Memory for a tile of queries: q [rows][q_stride], scores [rows][round_up(max_length)], out
// [rows][width].
struct AttentionScratch {
  int64_t q_stride;
  AlignedArray<float> scores, out;
  AlignedArray<Lhs> q;
  AttentionScratch(int64_t max_length, int64_t d, int64_t width)
      : q_stride(d),
        scores(aligned_array<float>(MAX_QUERIES * round_up(max_length))),
        out(aligned_array<float>(MAX_QUERIES * width)),
        q(aligned_array<Lhs>(MAX_QUERIES * d)) {}
};

// Scores become e ** ((score - maximum) / sqrt(d)), as operands for `gemm` in the same memory, 0
// beyond the length; -> their sum.
template <class S>
float softmax(const KVHead<S>& head, float* scores, int64_t length, int64_t padded) {
  if constexpr (KVHead<S>::SCALED) {
    for (int64_t t = 0; t < length; t += PANEL)
      store(scores + t, mul(load(scores + t), head.scales(head.key_scales, t, length)));
  }
  for (int64_t t = length; t < round_up(length); t++)
    scores[t] = -std::numeric_limits<float>::infinity();
  const Floats root = splat(1 / std::sqrt(float(head.d)));
  Floats largest = load(scores), sum = splat(0);
  for (int64_t t = PANEL; t < length; t += PANEL) largest = maximum(largest, load(scores + t));
  float parts[PANEL], total = 0;
  store(parts, largest);
  const Floats below = splat(-*std::max_element(parts, parts + PANEL));
  const auto weights = reinterpret_cast<Lhs*>(scores);
  for (int64_t t = 0; t < length; t += PANEL) {
    Floats p = exponential(mul(add(load(scores + t), below), root));
    sum = add(sum, p);
    if constexpr (KVHead<S>::SCALED) p = mul(p, head.scales(head.value_scales, t, length));
    store_lhs(weights + t, p);
  }
  std::memset(weights + length, 0, (padded - length) * sizeof(Lhs));
  store(parts, sum);
  for (float part : parts) total += part;
  return total;
}

// Attention of up to MAX_QUERIES queries, each over its first `lengths` tokens.
template <class S>
void attend_tile(const KVHead<S>& head, int64_t rows, const int64_t* lengths,
                 AttentionScratch& scratch) {
  const int64_t max_length = *std::max_element(lengths, lengths + rows),
                padded = round_up(max_length), d = head.d, width = head.width;
  float *scores = scratch.scores.get(), *out = scratch.out.get();
  const auto weights = reinterpret_cast<Lhs*>(scores);
  float inverse_sums[MAX_QUERIES];
  gemm(rows, scratch.q.get(), d, head.keys, head.capacity, d, max_length, false, scores, padded);
  for (int64_t m = 0; m < rows; m++)
    inverse_sums[m] = 1 / softmax(head, scores + m * padded, lengths[m], padded);
  gemm(rows, weights, padded * sizeof(float) / sizeof(Lhs), head.values, width, max_length, width,
       true, out, width);
  for (int64_t m = 0; m < rows; m++) {
    for (float* x = out + m * width; x < out + (m + 1) * width; x += PANEL)
      store(x, mul(load(x), splat(inverse_sums[m])));
  }
}

}  // namespace
