// Products of attention over a bfloat16 KV cache by vector registers, with float32 sums.

#pragma once

#include "kv_cache.h"

namespace {

// c[m][0..16 N) = sum over k of a[m][k] * b[k][0..16 N), K_STEP k at a time and in order for every
// M and N: batch-invariant. b has `depth` rows, a has columns up to a multiple of K_STEP; b has
// `have` columns where N is 1. Memory is prefetched `prefetch_distance` before its use.
template <int M, int N>
void gemm_panels(const Lhs* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t depth,
                 int64_t have, int64_t prefetch_distance, float* c, int64_t c_stride) {
  static const uint16_t zeros[N * PANEL] = {};
  Floats sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sum[m][n] = splat(0);
  }
  for (int64_t k = 0; k < depth; k += K_STEP, a += K_STEP, b += K_STEP * b_stride) {
    const uint16_t* other = k + 1 < depth ? b + b_stride : zeros;
    KVector some[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) some[n] = load_k(b + n * PANEL, other + n * PANEL, have);
    for (size_t line = 0; line < N * PANEL * sizeof(uint16_t); line += 64) {
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

// The same for any number of columns, widest panels first. Rows of c are padded to whole panels.
template <int M, int N>
void gemm_columns(const Lhs* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                  int64_t depth, int64_t columns, bool down, float* c, int64_t c_stride) {
  const int64_t prefetch_distance =
      down ? 4096 / sizeof(uint16_t) : N * PANEL;  // next come further rows, or the next columns
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
inline void gemv_rows(const Lhs* a, const uint16_t* b, int64_t b_stride, int64_t depth,
                      int64_t columns, float* c) {
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

template <int M = ROWS>
void gemm(int64_t rows, const Lhs* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
          int64_t depth, int64_t columns, bool down, float* c, int64_t c_stride) {
  if (rows == 1 && !down) return gemv_rows(a, b, b_stride, depth, columns, c);
  if (rows == M)
    return gemm_columns<M, panels_per_pass(M)>(a, a_stride, b, b_stride, depth, columns, down, c,
                                               c_stride);
  if constexpr (M > 1)
    gemm<M - 1>(rows, a, a_stride, b, b_stride, depth, columns, down, c, c_stride);
}

template <>
struct AttentionProducts<uint16_t> {
  struct Mode {};  // of denormals: as it is
  int64_t d, width, capacity = 0, count = 0;
  const uint16_t *keys = nullptr, *values = nullptr;  // of the block
  AlignedArray<Lhs> q, weights;                       // [MAX_QUERIES][d], [ROWS][BLOCK]
  AlignedArray<float> sums;                           // [ROWS][width]

  AttentionProducts(int64_t d, int64_t width)
      : d(d),
        width(width),
        q(aligned_array<Lhs>(MAX_QUERIES * d)),
        weights(aligned_array<Lhs>(ROWS * BLOCK)),
        sums(aligned_array<float>(ROWS * width)) {}

  void load_query(int64_t m, const uint16_t* from) {
    for (int64_t i = 0; i < d; i++) to_lhs(&q[m * d + i], from[i]);
  }
  void load_block(const KVHead<uint16_t>& head, int64_t begin, int64_t length, int64_t) {
    keys = head.keys + begin, values = head.values + begin * width;
    capacity = head.capacity, count = std::min(BLOCK, length - begin);
  }
  void multiply_keys(int64_t first, int64_t rows, float* scores) const {
    gemm(rows, &q[first * d], d, keys, capacity, d, count, false, scores, BLOCK);
  }
  Floats score(const float* scores, int64_t t) const { return load(scores + t); }
  float factor(int64_t) const { return 1; }
  template <class F>
  void store_weights(int64_t m, int64_t visible, F&& p) {
    Lhs* row = &weights[m * BLOCK];
    for (int64_t t = 0; t < visible; t += PANEL) store_lhs(row + t, p(t));
    std::fill(row + visible, row + round_up(count), 0);
  }
  void multiply_values(int64_t rows) {
    gemm(rows, weights.get(), BLOCK, values, width, count, width, true, sums.get(), width);
  }
  Floats sum(int64_t m, int64_t i) const { return load(&sums[m * width + i]); }
};

}  // namespace
