// Products of attention over a bfloat16 KV cache by the tile registers of AMX, with float32 sums.

#pragma once

#include "kv_cache.h"

namespace {

constexpr int64_t K_TILE = 32;  // bfloat16 numbers in a row of a tile register
constexpr int64_t TILE_NUMBERS = 16 * K_TILE;

inline int64_t k_tiles(int64_t k) { return (k + K_TILE - 1) / K_TILE; }

// Vector instructions take denormals as 0, as tile products do, while its object lives.
class FlushDenormals {
 public:
  FlushDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }

 private:
  const unsigned before;
};

// Indices that take 16 numbers from `first` on of two vectors by turns.
inline __m512i interleave(int first) {
  const __m512i pairs =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  return _mm512_or_si512(pairs,
                         _mm512_slli_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(32)), 16));
}

// Packs rows [rows][columns], `stride` apart, as tiles, each the right operand of a product: [16
// pairs of rows][16 columns][2 rows]. Tile (i, j) of 32 rows and 16 columns goes to
// to + (i * row_step + j * column_step) tiles. They are 0 beyond the last row and column.
inline void pack_tiles(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                       int64_t row_step, int64_t column_step, uint16_t* to) {
  static const uint16_t zeros[PANEL] = {};
  for (int64_t k = 0; k < k_tiles(rows) * K_TILE; k += 2, from += 2 * stride) {
    uint16_t* pair = to + k / K_TILE * row_step * TILE_NUMBERS + k % K_TILE * PANEL;
    int64_t i = 0;
    for (; k + 1 < rows && i + 2 * PANEL <= columns; i += 2 * PANEL) {  // two panels at once
      const __m512i a = _mm512_loadu_si512(from + i), b = _mm512_loadu_si512(from + stride + i);
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, interleave(0), b));
      pair += column_step * TILE_NUMBERS;
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, interleave(PANEL), b));
      pair += column_step * TILE_NUMBERS;
    }
    for (; i < columns; i += PANEL, pair += column_step * TILE_NUMBERS) {
      const int64_t have = std::min(PANEL, columns - i);
      const uint16_t *first = k < rows ? from + i : zeros,
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
template <int PAIRS>
void multiply_by_keys(const uint16_t* q, const uint16_t* keys, int64_t stride, int64_t d,
                      int64_t count, float* scores) {
  alignas(64) float even[BLOCK], odd[BLOCK];
  for (int64_t k = 0; k < d; k += 2 * PAIRS) {
    const bool first = k % K_TILE == 0, last = (k + 2 * PAIRS) % K_TILE == 0 || k + 2 * PAIRS == d;
    Floats a[2 * PAIRS];
#pragma GCC unroll 8
    for (int j = 0; j < 2 * PAIRS; j++) a[j] = splat(to_float(q[k + j]));
    for (int64_t i = 0; i < count; i += PANEL) {
      const int64_t have = std::min(PANEL, count - i);
      const uint16_t* row = keys + k * stride + i;
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
template <int N>
void multiply_by_values(const uint16_t* weights, const uint16_t* values, int64_t stride,
                        int64_t count, float* out) {
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
        const uint16_t* row = values + (k + i) * stride;
        prefetch(row + 4096 / sizeof(uint16_t));
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

template <>
struct AttentionProducts<uint16_t> {
  using Mode = FlushDenormals;
  int64_t d, width, stride, capacity = 0, count = 0;
  bool packed = false;  // a single query multiplies with the KV cache as it is
  const uint16_t *keys = nullptr, *values = nullptr;  // of the block
  AlignedArray<uint16_t> q, weights;                  // [MAX_QUERIES][stride], [ROWS][BLOCK]
  AlignedArray<uint16_t> packed_keys;                 // [panels of 16 keys][tiles of d]
  AlignedArray<uint16_t> packed_values;               // [panels of the width][tiles of keys]
  AlignedArray<float> sums;                           // [ROWS][width]

  AttentionProducts(int64_t d, int64_t width)
      : d(d),
        width(width),
        stride(k_tiles(d) * K_TILE),
        q(aligned_array<uint16_t>(MAX_QUERIES * stride)),
        weights(aligned_array<uint16_t>(ROWS * BLOCK)),
        packed_keys(aligned_array<uint16_t>(BLOCK * stride)),
        packed_values(aligned_array<uint16_t>(BLOCK * width)),
        sums(aligned_array<float>(ROWS * width)) {
    std::fill_n(q.get(), MAX_QUERIES * stride, 0);
    std::fill_n(weights.get(), ROWS * BLOCK, 0);
  }

  void load_query(int64_t m, const uint16_t* from) { std::copy_n(from, d, &q[m * stride]); }
  void load_block(const KVHead<uint16_t>& head, int64_t begin, int64_t length, int64_t queries) {
    keys = head.keys + begin, values = head.values + begin * width;
    capacity = head.capacity, count = std::min(BLOCK, length - begin), packed = queries > 1;
    if (!packed) return;
    pack_tiles(keys, capacity, d, count, 1, k_tiles(d), packed_keys.get());
    pack_tiles(values, width, count, width, 1, k_tiles(count), packed_values.get());
  }
  void multiply_keys(int64_t first, int64_t rows, float* scores) const {
    if (packed)
      return multiply_tiles(rows, &q[first * stride], stride, packed_keys.get(), k_tiles(d),
                            round_up(count) / PANEL, scores, BLOCK);
    (d % 8 ? multiply_by_keys<1> : multiply_by_keys<4>)(q.get(), keys, capacity, d, count, scores);
  }
  Floats score(const float* scores, int64_t t) const { return load(scores + t); }
  float factor(int64_t) const { return 1; }
  template <class F>
  void store_weights(int64_t m, int64_t visible, F&& p) {
    uint16_t* row = &weights[m * BLOCK];
    for (int64_t t = 0; t < visible; t += PANEL) store(row + t, p(t));
    std::fill(row + visible, row + std::max(round_up(visible), k_tiles(count) * K_TILE), 0);
  }
  void multiply_values(int64_t rows) {
    if (packed)
      return multiply_tiles(rows, weights.get(), BLOCK, packed_values.get(), k_tiles(count),
                            width / PANEL, sums.get(), width);
    int64_t i = 0;
    for (; i + 4 * PANEL <= width; i += 4 * PANEL)
      multiply_by_values<4>(weights.get(), values + i, width, count, &sums[i]);
    for (; i < width; i += PANEL)
      multiply_by_values<1>(weights.get(), values + i, width, count, &sums[i]);
  }
  Floats sum(int64_t m, int64_t i) const { return load(&sums[m * width + i]); }
};

}  // namespace
