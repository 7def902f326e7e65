// Attention of some queries by the tile registers of AMX: bfloat16 products with float32 sums,
// block of keys after block with a running maximum (FlashAttention-2, arXiv 2307.08691).

#pragma once

#include <cmath>
#include <limits>

#include "kv_cache.h"

namespace {

constexpr int64_t BLOCK = 256;  // keys of a block
constexpr int64_t K_TILE = 32;  // bfloat16 numbers in a row of a tile register
constexpr int64_t TILE_NUMBERS = 16 * K_TILE;

inline int64_t k_tiles(int64_t k) { return (k + K_TILE - 1) / K_TILE; }

// 2 ** x, relative error 3e-6 (minimax on [0, 1)); 0 for -infinity.
inline Floats exp2_short(Floats x) {
  const Floats r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats y = splat(0.0135341676f);
  for (float c : {0.0520114639f, 0.241442753f, 0.693003836f, 1.00000259f}) y = fma(y, r, splat(c));
  return _mm512_scalef_ps(y, x);  // by the floor of x
}

// Vector instructions take denormals as 0, as tile products do, while its object lives.
class FlushDenormals {
 public:
  FlushDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }

 private:
  const unsigned before;
};

// Memory for a tile of queries. A packed tile is the right operand of a product: [16 pairs of
// rows][16 columns][2 rows].
struct AttentionScratch {
  int64_t q_stride;
  AlignedArray<uint16_t> q;        // [rows][q_stride], 0 beyond d
  AlignedArray<uint16_t> keys;     // [panels of 16 keys][tiles of d], packed
  AlignedArray<uint16_t> values;   // [panels of the width][tiles of keys], packed
  AlignedArray<float> scores;      // [rows][BLOCK]
  AlignedArray<uint16_t> weights;  // [rows][BLOCK]
  AlignedArray<float> out, sums;   // [rows][width], [rows][16]
  AlignedArray<float> partial;     // [rows][width], of a block
  AttentionScratch(int64_t, int64_t d, int64_t width)
      : q_stride(k_tiles(d) * K_TILE),
        q(aligned_array<uint16_t>(MAX_QUERIES * q_stride)),
        keys(aligned_array<uint16_t>(BLOCK * q_stride)),
        values(aligned_array<uint16_t>(BLOCK * width)),
        scores(aligned_array<float>(MAX_QUERIES * BLOCK)),
        weights(aligned_array<uint16_t>(MAX_QUERIES * BLOCK)),
        out(aligned_array<float>(MAX_QUERIES * width)),
        sums(aligned_array<float>(MAX_QUERIES * PANEL)),
        partial(aligned_array<float>(MAX_QUERIES * width)) {
    std::fill_n(q.get(), MAX_QUERIES * q_stride, 0);
    std::fill_n(weights.get(), MAX_QUERIES * BLOCK, 0);
  }
};

// Indices that take 16 numbers from `first` on of two vectors by turns.
inline __m512i interleave(int first) {
  const __m512i pairs =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  return _mm512_or_si512(pairs,
                         _mm512_slli_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(32)), 16));
}

// Packs rows [rows][columns], `stride` apart, as tiles; tile (i, j) of 32 rows and 16 columns goes
// to to + (i * row_step + j * column_step) tiles. They are 0 beyond the last row and column.
template <class S>
void pack_tiles(const S* from, int64_t stride, int64_t rows, int64_t columns, int64_t row_step,
                int64_t column_step, uint16_t* to) {
  static const S zeros[PANEL] = {};
  for (int64_t k = 0; k < k_tiles(rows) * K_TILE; k += 2, from += 2 * stride) {
    uint16_t* pair = to + k / K_TILE * row_step * TILE_NUMBERS + k % K_TILE * PANEL;
    int64_t i = 0;
    if constexpr (sizeof(S) == 2) {  // two panels at once
      for (; k + 1 < rows && i + 2 * PANEL <= columns; i += 2 * PANEL) {
        const __m512i a = _mm512_loadu_si512(from + i), b = _mm512_loadu_si512(from + stride + i);
        _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, interleave(0), b));
        pair += column_step * TILE_NUMBERS;
        _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, interleave(PANEL), b));
        pair += column_step * TILE_NUMBERS;
      }
    }
    for (; i < columns; i += PANEL, pair += column_step * TILE_NUMBERS) {
      const int64_t have = std::min(PANEL, columns - i);
      const S *first = k < rows ? from + i : zeros,
              *second = k + 1 < rows ? from + stride + i : zeros;
      _mm512_store_si512(pair, load_k(first, second, have));
    }
  }
}

// c [rows, padded to 16][16 n] = a [rows][32 depth] times the packed tiles b [n][depth].
inline void multiply_tiles(int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                           int64_t depth, int64_t n, float* c, int64_t c_stride) {
  const int64_t a_bytes = a_stride * sizeof(*a), c_bytes = c_stride * sizeof(*c);
  const bool two = rows > 16;
  finish_stores();
  for (int64_t i = 0; i < n; i += 2, b += 2 * depth * TILE_NUMBERS, c += 2 * PANEL) {
    const bool pair = i + 1 < n;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k++) {
      _tile_loadd(4, a + k * K_TILE, a_bytes);
      _tile_loadd(6, b + k * TILE_NUMBERS, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (two) {
        _tile_loadd(5, a + 16 * a_stride + k * K_TILE, a_bytes);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (!pair) continue;
      _tile_loadd(7, b + (depth + k) * TILE_NUMBERS, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (two) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if (two) _tile_stored(1, c + 16 * c_stride, c_bytes);
    if (!pair) continue;
    _tile_stored(2, c + PANEL, c_bytes);
    if (two) _tile_stored(3, c + 16 * c_stride + PANEL, c_bytes);
  }
}

// The same products for one query without packing, to the last bit: a tile product adds up the even
// and the odd of 32 numbers apart, by fused multiply-add, then both, then to the sum (TDPBF16PS in
// Intel's Software Developer's Manual; denormals are 0).
//
// scores [count] = q [d] times keys [d][count]; PAIRS pairs of rows at a time, each from end to
// end.
template <int PAIRS, class S>
void multiply_keys(const uint16_t* q, const S* keys, int64_t stride, int64_t d, int64_t count,
                   float* scores) {
  alignas(64) float even[BLOCK], odd[BLOCK];
  for (int64_t k = 0; k < d; k += 2 * PAIRS) {
    const bool first = k % K_TILE == 0, last = (k + 2 * PAIRS) % K_TILE == 0 || k + 2 * PAIRS == d;
    Floats a[2 * PAIRS];
#pragma GCC unroll 8
    for (int j = 0; j < 2 * PAIRS; j++) a[j] = splat(to_float(q[k + j]));
    for (int64_t i = 0; i < count; i += PANEL) {
      const int64_t have = std::min(PANEL, count - i);
      const S* row = keys + k * stride + i;
      Floats e = first ? splat(0) : load(even + i), o = first ? splat(0) : load(odd + i);
#pragma GCC unroll 8
      for (int j = 0; j < 2 * PAIRS; j += 2) {
        e = fma(load_masked(row + j * stride, have), a[j], e);
        o = fma(load_masked(row + (j + 1) * stride, have), a[j + 1], o);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 2 * PAIRS; j++)  // the next block
        prefetch(row + j * stride + BLOCK);
      if (last) {
        store(scores + i, add(k < K_TILE ? splat(0) : load(scores + i), add(e, o)));
      } else {
        store(even + i, e), store(odd + i, o);
      }
    }
  }
}

// out [16 N] = weights [count] times values [count][16 N], `stride` apart.
template <int N, class S>
void multiply_values(const uint16_t* weights, const S* values, int64_t stride, int64_t count,
                     float* out) {
  Floats sum[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) sum[n] = splat(0);
  for (int64_t begin = 0; begin < count; begin += K_TILE) {
    Floats parts[2][N];  // of even and odd rows
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) parts[0][n] = parts[1][n] = splat(0);
    for (int64_t k = begin; k < std::min(begin + K_TILE, count); k += 2) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        if (k + i == count) break;
        const Floats a = splat(to_float(weights[k + i]));
        const S* row = values + (k + i) * stride;
        prefetch(row + 4096 / sizeof(S));
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
          parts[i][n] = fma(load_masked(row + n * PANEL, PANEL), a, parts[i][n]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[n] = add(sum[n], add(parts[0][n], parts[1][n]));
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) store(out + n * PANEL, sum[n]);
}

// Attention of up to MAX_QUERIES queries, each over its first `lengths` tokens. Blocks begin at
// multiples of BLOCK: what a query computes does not depend on the others.
template <class S>
void attend_tile(const KVHead<S>& head, int64_t rows, const int64_t* lengths,
                 AttentionScratch& scratch) {
  constexpr bool SCALED = KVHead<S>::SCALED;
  const FlushDenormals flush;
  const int64_t max_length = *std::max_element(lengths, lengths + rows), width = head.width,
                depth = k_tiles(head.d);
  const Floats factor = splat(float(1.4426950408889634 / std::sqrt(double(head.d))));
  const Floats minus_infinity = splat(-std::numeric_limits<float>::infinity());
  float maxima[MAX_QUERIES];  // of scores, times `factor`
  std::fill_n(maxima, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(scratch.out.get(), rows * width, 0.0f);
  std::fill_n(scratch.sums.get(), rows * PANEL, 0.0f);
  for (int64_t begin = 0; begin < max_length; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, max_length - begin), panels = (count + PANEL - 1) / PANEL;
    const S *keys = head.keys + begin, *values = head.values + begin * width;
    if (rows == 1) {
      (head.d % 8 ? multiply_keys<1, S> : multiply_keys<4, S>)(scratch.q.get(), keys, head.capacity,
                                                               head.d, count, scratch.scores.get());
    } else {
      pack_tiles(keys, head.capacity, head.d, count, 1, depth, scratch.keys.get());
      pack_tiles(values, width, count, width, 1, k_tiles(count), scratch.values.get());
      multiply_tiles(rows, scratch.q.get(), scratch.q_stride, scratch.keys.get(), depth, panels,
                     scratch.scores.get(), BLOCK);
    }
    Floats key_scales[BLOCK / PANEL], value_scales[BLOCK / PANEL];
    for (int64_t i = 0; SCALED && i < panels; i++) {
      key_scales[i] = mul(head.scales(head.key_scales, begin + i * PANEL, max_length), factor);
      value_scales[i] = head.scales(head.value_scales, begin + i * PANEL, max_length);
    }
    float decays[MAX_QUERIES];  // of what earlier blocks have added up
    for (int64_t m = 0; m < rows; m++) {
      const int64_t visible = std::max<int64_t>(0, std::min(count, lengths[m] - begin));
      float* scores = &scratch.scores[m * BLOCK];
      uint16_t* weights = &scratch.weights[m * BLOCK];
      Floats largest = splat(maxima[m]);
      for (int64_t t = 0; t < visible; t += PANEL) {
        Floats x = mul(load(scores + t), SCALED ? key_scales[t / PANEL] : factor);
        if (t + PANEL > visible)
          x = _mm512_mask_mov_ps(minus_infinity, (1u << (visible - t)) - 1, x);
        store(scores + t, x);
        largest = maximum(largest, x);
      }
      const float next = _mm512_reduce_max_ps(largest);
      const Floats below = splat(-next), decay = exp2_short(splat(maxima[m] - next));
      Floats sum = splat(0);
      for (int64_t t = 0; t < visible; t += PANEL) {
        const Floats p = exp2_short(add(load(scores + t), below));
        sum = add(sum, p);
        store(weights + t, SCALED ? mul(p, value_scales[t / PANEL]) : p);
      }
      std::fill(weights + round_up(visible), weights + k_tiles(count) * K_TILE, 0);
      float* total = &scratch.sums[m * PANEL];
      store(total, fma(load(total), decay, sum));
      maxima[m] = next, decays[m] = _mm512_cvtss_f32(decay);
    }
    if (rows == 1) {
      int64_t i = 0;
      for (; i + 4 * PANEL <= width; i += 4 * PANEL)
        multiply_values<4>(scratch.weights.get(), values + i, width, count, &scratch.partial[i]);
      for (; i < width; i += PANEL)
        multiply_values<1>(scratch.weights.get(), values + i, width, count, &scratch.partial[i]);
    } else {
      multiply_tiles(rows, scratch.weights.get(), BLOCK, scratch.values.get(), k_tiles(count),
                     width / PANEL, scratch.partial.get(), width);
    }
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t i = m * width; i < (m + 1) * width; i += PANEL)
        store(&scratch.out[i],
              fma(load(&scratch.out[i]), splat(decays[m]), load(&scratch.partial[i])));
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    float total = 0;
    for (int64_t i = 0; i < PANEL; i++) total += scratch.sums[m * PANEL + i];
    for (int64_t i = m * width; i < (m + 1) * width; i += PANEL)
      store(&scratch.out[i], mul(load(&scratch.out[i]), splat(1 / total)));
  }
}

}  // namespace
