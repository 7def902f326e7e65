// Attention over a KV cache in bfloat16 or int8.

#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "simd.h"

namespace {

// e ** x for x <= 0, relative error 2e-7 (series of e ** r up to r ** 6, |r| <= ln 2 / 2).
inline Floats exponential(Floats x) {
  x = maximum(splat(-87.0f), x);  // this order of operands keeps a NaN
  const Floats n = round_even(mul(x, splat(1.44269504f)));
  const Floats r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Floats y = splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, splat(c));
  return mul_pow2(y, n);
}

// 1 / (1 + e ** -x)
inline Floats sigmoid(Floats x) {
  const Floats e = exponential(minimum(x, mul(x, splat(-1))));
  return div(select_by_sign(x, splat(1), e), add(e, splat(1)));
}

inline int64_t round_up(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

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
      _mm_prefetch(reinterpret_cast<const char*>(b + prefetch_distance) + line, _MM_HINT_T0);
      if (K_STEP == 2)
        _mm_prefetch(reinterpret_cast<const char*>(other + prefetch_distance) + line, _MM_HINT_T0);
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

// KV cache of a head: keys [d][capacity] and values [capacity][width], of which the first d count;
// bfloat16, or int8 with a float16 scale per token. Both products are bfloat16 with float32 sums,
// in the order of the keys: a query's result is bit-identical in any batch.
template <class S>
struct KVHead {
  S *keys, *values;
  uint16_t *key_scales, *value_scales;  // of all heads
  int64_t first_scale, d, capacity, width;
  static constexpr bool SCALED = sizeof(S) == 1;
  static constexpr int64_t PREFETCH_TOKENS = 8;

  // Writes keys and values of `count` tokens, `stride` apart, to the positions from `place` on.
  void append(int64_t place, int64_t count, const uint16_t* key, const uint16_t* value,
              int64_t stride) const {
    for (int64_t last = place + count; place < last; place++, key += stride, value += stride) {
      // the hardware prefetcher does not follow rows so far apart
      for (int64_t i = 0; i < d; i += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(key + PREFETCH_TOKENS * stride + i),
                     _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(value + PREFETCH_TOKENS * stride + i),
                     _MM_HINT_T0);
      }
      if constexpr (SCALED) {
        const float by_key = scale(key, &key_scales[first_scale + place]);
        const float by_value = scale(value, &value_scales[first_scale + place]);
        for (int64_t i = 0; i < d; i++)
          keys[i * capacity + place] = rounded(to_float(key[i]), by_key);
        for (int64_t i = 0; i < d; i++)
          values[place * width + i] = rounded(to_float(value[i]), by_value);
      } else {
        for (int64_t i = 0; i < d; i++) keys[i * capacity + place] = key[i];
        std::memcpy(values + place * width, value, d * sizeof(uint16_t));
      }
    }
  }

  float scale(const uint16_t* x, uint16_t* to) const {
    float largest = 0;
    for (int64_t i = 0; i < d; i++) largest = std::max(largest, std::abs(to_float(x[i])));
    *to = _cvtss_sh(largest / 127, _MM_FROUND_TO_NEAREST_INT);
    return half_to_float(*to);
  }

  static int8_t rounded(float x, float scale) {
    return scale == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x / scale))));
  }

  // Attention of up to MAX_QUERIES queries [rows][d], each over its first `lengths` tokens -> out
  // [rows][width]. scores: memory for round_up(max_length) per row.
  void attend(int64_t rows, const Lhs* q, const int64_t* lengths, float* scores, float* out) const {
    const int64_t max_length = *std::max_element(lengths, lengths + rows),
                  padded = round_up(max_length);
    const auto weights = reinterpret_cast<Lhs*>(scores);
    float inverse_sums[MAX_QUERIES];
    gemm(rows, q, d, keys, capacity, d, max_length, false, scores, padded);
    for (int64_t m = 0; m < rows; m++)
      inverse_sums[m] = 1 / softmax(scores + m * padded, lengths[m], padded);
    gemm(rows, weights, padded * sizeof(float) / sizeof(Lhs), values, width, max_length, width,
         true, out, width);
    for (int64_t m = 0; m < rows; m++) {
      for (float* x = out + m * width; x < out + (m + 1) * width; x += PANEL)
        store(x, mul(load(x), splat(inverse_sums[m])));
    }
  }

  // Scores become e ** ((score - maximum) / sqrt(d)), as operands for `gemm` in the same memory, 0
  // beyond the length; -> their sum.
  float softmax(float* scores, int64_t length, int64_t padded) const {
    if constexpr (SCALED) {
      for (int64_t t = 0; t < length; t += PANEL)
        store(scores + t, mul(load(scores + t), scales(key_scales, t, length)));
    }
    for (int64_t t = length; t < round_up(length); t++)
      scores[t] = -std::numeric_limits<float>::infinity();
    const Floats root = splat(1 / std::sqrt(float(d)));
    Floats largest = load(scores), sum = splat(0);
    for (int64_t t = PANEL; t < length; t += PANEL) largest = maximum(largest, load(scores + t));
    float parts[PANEL], total = 0;
    store(parts, largest);
    const Floats below = splat(-*std::max_element(parts, parts + PANEL));
    const auto weights = reinterpret_cast<Lhs*>(scores);
    for (int64_t t = 0; t < length; t += PANEL) {
      Floats p = exponential(mul(add(load(scores + t), below), root));
      sum = add(sum, p);
      if constexpr (SCALED) p = mul(p, scales(value_scales, t, length));
      store_lhs(weights + t, p);
    }
    std::memset(weights + length, 0, (padded - length) * sizeof(Lhs));
    store(parts, sum);
    for (float part : parts) total += part;
    return total;
  }

  Floats scales(const uint16_t* from, int64_t t, int64_t length) const {
    from += first_scale + t;
    if (t + PANEL <= length) return load_half(from);
    uint16_t some[PANEL] = {};
    std::memcpy(some, from, (length - t) * sizeof(uint16_t));
    return load_half(some);
  }
};

// Memory for a tile of queries.
struct AttentionScratch {
  AlignedArray<float> scores, out;
  AlignedArray<Lhs> q;
  AttentionScratch(int64_t max_length, int64_t d, int64_t width)
      : scores(aligned_array<float>(MAX_QUERIES * round_up(max_length))),
        out(aligned_array<float>(MAX_QUERIES * width)),
        q(aligned_array<Lhs>(MAX_QUERIES * d)) {}
};

// A thread's memory for a layer.
struct Workspace {
  AttentionScratch attention;
  AlignedArray<float> row;
  UnpackBuffer unpack_buffer;
  Workspace(AttentionScratch attention, int64_t width, int64_t groups)
      : attention(std::move(attention)), row(aligned_array<float>(width)), unpack_buffer(groups) {}
};

// Queries of some tokens of a sequence, of the `group` heads that share a KV head (GQA). The first
// token attends to `visible` tokens; with `causal` each later one to one more.
struct Queries {
  const uint16_t* q;  // of the first token
  int64_t tokens, stride, group, visible;
  bool causal;

  int64_t tiles() const { return (tokens * group + MAX_QUERIES - 1) / MAX_QUERIES; }
  // Calls sink(token, head of the group, attention output) for a tile of queries.
  template <class S, class F>
  void attend(int64_t tile, const KVHead<S>& head, AttentionScratch& scratch, F&& sink) const {
    const int64_t first = tile * tokens * group / tiles(),
                  rows = (tile + 1) * tokens * group / tiles() - first;
    int64_t lengths[MAX_QUERIES];
    for (int64_t m = 0; m < rows; m++) {
      const int64_t token = (first + m) / group, h = (first + m) % group;
      const uint16_t* from = q + token * stride + h * head.d;
      for (int64_t i = 0; i < head.d; i++) to_lhs(&scratch.q[m * head.d + i], from[i]);
      lengths[m] = visible + (causal ? token : 0);
    }
    head.attend(rows, scratch.q.get(), lengths, scratch.scores.get(), scratch.out.get());
    for (int64_t m = 0; m < rows; m++)
      sink((first + m) / group, (first + m) % group, &scratch.out[m * head.width]);
  }
};

// Attention of the new tokens of a sequence.
template <class S>
struct Attention {
  const uint16_t *q, *k, *v;            // [tokens][heads][d], [tokens][kv heads][d] twice
  S *keys, *values;                     // [kv heads][d][capacity], [kv heads][capacity][d]
  uint16_t *key_scales, *value_scales;  // [kv heads][capacity], float16; int8 only
  uint16_t* out;
  int64_t tokens, heads, kv_heads, d, capacity, at;

  static void run(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Attention*>(context);
    AttentionScratch scratch(self.at + self.tokens, self.d, self.d);
    for (int64_t head = begin; head < end; head++) self.attend_head(head, scratch);
  }

  void attend_head(int64_t number, AttentionScratch& scratch) const {
    const int64_t group = heads / kv_heads, part = number * capacity;
    const KVHead<S> head{
        keys + part * d, values + part * d, key_scales, value_scales, part, d, capacity, d};
    head.append(at, tokens, k + number * d, v + number * d, kv_heads * d);
    const Queries queries{q + number * group * d, tokens, heads * d, group, at + 1, true};
    for (int64_t tile = 0; tile < queries.tiles(); tile++) {
      queries.attend(tile, head, scratch, [&](int64_t token, int64_t h, const float* x) {
        uint16_t* to = out + (token * heads + number * group + h) * d;
        for (int64_t i = 0; i < d; i += PANEL) store(to + i, load(x + i));
      });
    }
  }
};

template <class S>
void attend(ParallelFor parallel_for, const uint16_t* q, const uint16_t* k, const uint16_t* v,
            void* keys, void* values, uint16_t* key_scales, uint16_t* value_scales, uint16_t* out,
            int64_t tokens, int64_t heads, int64_t kv_heads, int64_t d, int64_t capacity,
            int64_t at) {
  Attention<S> self{q,
                    k,
                    v,
                    static_cast<S*>(keys),
                    static_cast<S*>(values),
                    key_scales,
                    value_scales,
                    out,
                    tokens,
                    heads,
                    kv_heads,
                    d,
                    capacity,
                    at};
  const int64_t work = 2 * tokens * heads / kv_heads * d * (at + tokens);
  parallel_for(0, kv_heads, std::max<int64_t>(1, MIN_PARALLEL_WORK / 4 / work), Attention<S>::run,
               &self);
}

}  // namespace
