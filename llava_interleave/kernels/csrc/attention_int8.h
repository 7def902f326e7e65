// Products of attention over an int8 KV cache, by 8-bit dot products (as SageAttention, arXiv
// 2410.02367): queries are rounded to 8 bits with a scale for each, attention weights to 14 bits in
// two planes of 7, with a scale for each query and block. The sums are exact integers, so they are
// the same with every instruction set and in any batch.

#pragma once

#include "kv_cache.h"

namespace {

constexpr float LEVELS = (1 << 14) - 1;  // of attention weights
#if defined(__AMX_INT8__)
constexpr int64_t DEPTH = 64;  // what products add up is padded to
constexpr int64_t VECTOR_ROWS = MAX_ROWS;
#else
constexpr int64_t DEPTH = 4;
constexpr int64_t VECTOR_ROWS = ROWS;
#endif

inline int64_t padded_depth(int64_t rows) { return (rows + DEPTH - 1) / DEPTH * DEPTH; }

// Bytes [rows][columns] of a KV cache, `stride` apart. They are read in quads of rows; memory is
// prefetched `ahead` bytes before its use.
struct ByteRows {
  const int8_t* from;
  int64_t stride, rows, columns, ahead;

  int64_t quads() const { return (rows + 3) / 4; }
  // Rows from 4 quad on and columns from i on as `interleave`; 0 beyond the last ones.
  void read(int64_t quad, int64_t i, int8_t zero, Bytes (&out)[WIDE]) const {
    constexpr int64_t SIZE = WIDE * PANEL;
    const int64_t height = std::min<int64_t>(4, rows - 4 * quad),
                  have = std::min(SIZE, columns - i);
    const int8_t* first = from + 4 * quad * stride + i;
    for (int64_t j = 0; i % 64 == 0 && j < height; j++) prefetch(first + j * stride + ahead);
    if (height == 4 && have == SIZE) return interleave(first, stride, zero, out);
    int8_t some[4 * SIZE] = {};
    for (int64_t j = 0; j < height; j++)
      std::memcpy(some + j * SIZE, first + j * stride, size_t(have));
    interleave(some, SIZE, zero, out);
  }
  // As [panels of 16 columns][depth quads][16 columns][4 rows], each byte + zero.
  void pack(int64_t depth, int8_t zero, uint8_t* to) const {
    for (int64_t quad = 0; quad < quads(); quad++) {
      for (int64_t i = 0; i < columns; i += WIDE * PANEL) {
        Bytes some[WIDE];
        read(quad, i, zero, some);
        restore_order(some);
        for (int64_t n = 0; n < std::min<int64_t>(WIDE, (columns - i + PANEL - 1) / PANEL); n++)
          store(to + ((i / PANEL + n) * depth + quad) * 4 * PANEL, some[n]);
      }
    }
  }
  // c [planes][columns] = a [planes][rows] times this, without packing; as `multiply_quads`.
  template <bool POSITIVE, int PLANES>
  void multiply(const int8_t* a, int64_t a_stride, int32_t start, int32_t* c,
                int64_t c_stride) const {
    for (int64_t i = 0; i < columns; i += WIDE * PANEL) {
      Ints sum[PLANES][WIDE];
      for (int plane = 0; plane < PLANES; plane++) {
        for (int n = 0; n < WIDE; n++) sum[plane][n] = splat32(start);
      }
      for (int64_t quad = 0; quad < quads(); quad++) {
        Bytes some[WIDE];
        read(quad, i, POSITIVE ? 0 : int8_t(ZERO), some);
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; plane++) {
#pragma GCC unroll 4
          for (int n = 0; n < WIDE; n++) {
            if constexpr (POSITIVE)
              dot_positive(sum[plane][n], some[n], a + plane * a_stride + 4 * quad);
            else
              dot(sum[plane][n], some[n], a + plane * a_stride + 4 * quad);
          }
        }
      }
      for (int plane = 0; plane < PLANES; plane++) {
        restore_order(sum[plane]);
        for (int64_t n = 0; n < std::min<int64_t>(WIDE, (columns - i + PANEL - 1) / PANEL); n++)
          store(c + plane * c_stride + i + n * PANEL, sum[plane][n]);
      }
    }
  }
};

#if defined(__AMX_INT8__)
// `multiply_quads` in tile registers: c [rows, padded to 16][16 panels]; nothing is added to b, and
// depth is a multiple of 16.
inline void multiply_tiles(int64_t rows, const int8_t* a, int64_t a_stride, const uint8_t* b,
                           int64_t depth, int64_t panels, int32_t* c, int64_t c_stride) {
  const int64_t c_bytes = c_stride * sizeof(int32_t), size = depth * 4 * PANEL;
  const bool two = rows > 16;
  finish_stores();
  for (int64_t i = 0; i < panels; i += 2, b += 2 * size, c += 2 * PANEL) {
    const bool pair = i + 1 < panels;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 16) {
      _tile_loadd(4, a + 4 * k, a_stride);
      _tile_loadd(6, b + k * 4 * PANEL, 64);
      _tile_dpbssd(0, 4, 6);
      if (two) {
        _tile_loadd(5, a + 16 * a_stride + 4 * k, a_stride);
        _tile_dpbssd(1, 5, 6);
      }
      if (!pair) continue;
      _tile_loadd(7, b + size + k * 4 * PANEL, 64);
      _tile_dpbssd(2, 4, 7);
      if (two) _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if (two) _tile_stored(1, c + 16 * c_stride, c_bytes);
    if (!pair) continue;
    _tile_stored(2, c + PANEL, c_bytes);
    if (two) _tile_stored(3, c + 16 * c_stride + PANEL, c_bytes);
  }
}
#endif

template <bool POSITIVE, int M, int N>
void multiply_quads(const int8_t* a, int64_t a_stride, const int32_t* start, const uint8_t* b,
                    int64_t depth, int32_t* c, int64_t c_stride) {
  Ints sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = splat32(POSITIVE ? 0 : start[m]);
  }
  for (int64_t k = 0; k < depth; k++, a += 4, b += 4 * PANEL) {
    Bytes some[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) some[n] = bytes(b + n * depth * 4 * PANEL);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        if constexpr (POSITIVE)
          dot_positive(sum[m][n], some[n], a + m * a_stride);
        else
          dot(sum[m][n], some[n], a + m * a_stride);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(c + m * c_stride + n * PANEL, sum[m][n]);
  }
}

// c [rows][16 panels] = a [rows][4 depth], of which all are positive or not, times the packed b.
// With signs, b has ZERO added, and the sums begin with `start` for each row.
template <bool POSITIVE, int M = VECTOR_ROWS>
void multiply_quads(int64_t rows, const int8_t* a, int64_t a_stride, const int32_t* start,
                    const uint8_t* b, int64_t depth, int64_t panels, int32_t* c, int64_t c_stride) {
  constexpr int N = panels_per_pass(M) < 4 ? panels_per_pass(M) : 4;
  if (rows == M) {
    int64_t i = 0;
    for (; i + N <= panels; i += N)
      multiply_quads<POSITIVE, M, N>(a, a_stride, start, b + i * depth * 4 * PANEL, depth,
                                     c + i * PANEL, c_stride);
    for (; i < panels; i++)
      multiply_quads<POSITIVE, M, 1>(a, a_stride, start, b + i * depth * 4 * PANEL, depth,
                                     c + i * PANEL, c_stride);
    return;
  }
  if constexpr (M > 1)
    multiply_quads<POSITIVE, M - 1>(rows, a, a_stride, start, b, depth, panels, c, c_stride);
}

template <>
struct AttentionProducts<int8_t> {
  struct Mode {};                                // of denormals: as it is
  int64_t d, width, stride;                      // bytes of a padded query
  AlignedArray<int8_t> q;                        // [MAX_QUERIES][stride]
  AlignedArray<float> q_scales;                  // [MAX_QUERIES]
  AlignedArray<int32_t> q_sums;                  // [MAX_QUERIES], -ZERO * sum of q
  AlignedArray<uint8_t> keys, values;            // of a block, packed
  AlignedArray<float> key_scales, value_scales;  // of a block
  float largest_scales[BLOCK / PANEL];           // of the values of all panels up to this one
  AlignedArray<int8_t> weights;                  // [2 planes][ROWS][BLOCK]
  AlignedArray<int32_t> sums;                    // [2 planes][ROWS][width]
  ByteRows key_rows, value_rows;
  int64_t count = 0;
  bool packed = false, tiled = false;
  float steps[ROWS];  // of the attention weights

  AttentionProducts(int64_t d, int64_t width)
      : d(d),
        width(width),
        stride(padded_depth(d)),
        q(aligned_array<int8_t>(MAX_QUERIES * stride)),
        q_scales(aligned_array<float>(MAX_QUERIES)),
        q_sums(aligned_array<int32_t>(MAX_QUERIES)),
        keys(aligned_array<uint8_t>(BLOCK * stride)),
        values(aligned_array<uint8_t>(BLOCK * width)),
        key_scales(aligned_array<float>(BLOCK)),
        value_scales(aligned_array<float>(BLOCK)),
        weights(aligned_array<int8_t>(2 * ROWS * BLOCK)),
        sums(aligned_array<int32_t>(2 * ROWS * width)) {
    std::fill_n(q.get(), MAX_QUERIES * stride, 0);
    std::fill_n(keys.get(), BLOCK * stride, 0);
    std::fill_n(values.get(), BLOCK * width, 0);
    std::fill_n(weights.get(), 2 * ROWS * BLOCK, 0);
  }

  void load_query(int64_t m, const uint16_t* from) {
    Floats sizes = splat(0);
    for (int64_t i = 0; i < d; i += PANEL)
      sizes = maximum(sizes, maximum(load(from + i), mul(load(from + i), splat(-1))));
    const float size = largest(sizes), factor = size == 0 ? 0 : 127 / size;
    int32_t sum = 0;
    for (int64_t i = 0; i < d; i += PANEL)
      store(&q[m * stride + i], to_ints(mul(load(from + i), splat(factor))));
    for (int64_t i = 0; ZERO && i < d; i++) sum += q[m * stride + i];
    q_sums[m] = -ZERO * sum;
    q_scales[m] = size / 127;
  }

  // Prepares the block of `count` tokens from `begin` on; the head has `length`.
  void load_block(const KVHead<int8_t>& head, int64_t begin, int64_t length, int64_t queries) {
    count = std::min(BLOCK, length - begin);
    key_rows = {head.keys + begin, head.capacity, d, count, BLOCK};
    value_rows = {head.values + begin * width, width, count, width, 4096};
    packed = queries > 1;
#if defined(__AMX_INT8__)
    tiled = queries >= MIN_TILE_ROWS;
#endif
    if (packed) {
      key_rows.pack(stride / 4, tiled ? 0 : int8_t(ZERO), keys.get());
      value_rows.pack(padded_depth(count) / 4, 0, values.get());
    }
    for (int64_t t = 0; t < count; t += PANEL) {
      const Floats scales = head.scales(head.value_scales, begin + t, length);
      store(&key_scales[t], head.scales(head.key_scales, begin + t, length));
      store(&value_scales[t], scales);
      largest_scales[t / PANEL] = std::max(t ? largest_scales[t / PANEL - 1] : 0, largest(scales));
    }
  }

  // scores [rows][BLOCK], without the factors of the queries
  void multiply_keys(int64_t first, int64_t rows, float* scores) {
    const auto products = reinterpret_cast<int32_t*>(scores);
    const int64_t panels = round_up(count) / PANEL;
    if (!packed) return key_rows.multiply<false, 1>(q.get(), 0, q_sums[0], products, BLOCK);
#if defined(__AMX_INT8__)
    if (tiled)
      return multiply_tiles(rows, &q[first * stride], stride, keys.get(), stride / 4, panels,
                            products, BLOCK);
#endif
    multiply_quads<false>(rows, &q[first * stride], stride, &q_sums[first], keys.get(), stride / 4,
                          panels, products, BLOCK);
  }
  Floats score(const float* scores, int64_t t) const {
    const auto products = reinterpret_cast<const int32_t*>(scores);
    return mul(to_floats(load(products + t)), load(&key_scales[t]));
  }
  float factor(int64_t m) const { return q_scales[m]; }

  // The attention weights of a row are p(panel) times the scales of the values.
  template <class F>
  void store_weights(int64_t m, int64_t visible, F&& p) {
    const int64_t whole = visible / PANEL * PANEL;
    float some[PANEL] = {}, size = whole ? largest_scales[whole / PANEL - 1] : 0;
    for (int64_t t = whole; t < visible; t++)
      size = std::max(size, some[t - whole] = value_scales[t]);
    const Floats factor = splat(size == 0 ? 0 : LEVELS / size);
    int8_t *high = &weights[m * BLOCK], *low = high + ROWS * BLOCK;
    steps[m] = size / LEVELS;
    const int64_t end = std::max(padded_depth(count), round_up(visible));
    for (int64_t t = 0; t < end; t += 4 * PANEL) {
      Ints four[4];
      for (int64_t i = 0; i < 4; i++) {
        const int64_t at = t + i * PANEL;
        four[i] = splat32(0);
        if (at < visible) {
          const Floats scales = load(at < whole ? &value_scales[at] : some);
          four[i] = to_ints(mul(mul(p(at), factor), scales));
        }
      }
      store_planes(high + t, low + t, four);
    }
  }

  void multiply_values(int64_t rows) {
    const int64_t depth = padded_depth(count) / 4, stride = ROWS * BLOCK;
    if (!packed)
      return value_rows.multiply<true, 2>(weights.get(), stride, 0, sums.get(), ROWS * width);
    for (int64_t plane = 0; plane < 2; plane++) {
      int32_t* to = &sums[plane * ROWS * width];
#if defined(__AMX_INT8__)
      if (tiled) {
        multiply_tiles(rows, &weights[plane * stride], BLOCK, values.get(), depth, width / PANEL,
                       to, width);
        continue;
      }
#endif
      multiply_quads<true>(rows, &weights[plane * stride], BLOCK, nullptr, values.get(), depth,
                           width / PANEL, to, width);
    }
  }
  Floats sum(int64_t m, int64_t i) const {
    const int32_t* high = &sums[m * width + i];
    return mul(to_floats(join_planes(load(high), load(high + ROWS * width))), splat(steps[m]));
  }
};

}  // namespace
