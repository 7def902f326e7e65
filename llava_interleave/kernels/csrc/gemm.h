// Products of 8-bit activations with packed int8 and int4 weights.
//
// A weight [out, in] is packed in panels of 16 outputs and groups of 128 inputs, in the order in
// which it is read:
//   int8: [panels][groups][32 quads][16 outputs][4 inputs], each byte q + 128
//   int4: [panels][groups], each first [16 outputs][4 subgroups of 32 inputs], the bytes
//         sub_scale + 16 * zero_point, then [16 pairs of quads][16 outputs][4 inputs], q_uint4 of
//         the pair's first quad in the low halves; q = sub_scale * (q_uint4 - zero_point)
//   scales: [panels][groups][16 outputs], float16
// All q are from -128 to 127, so int4 weights can be unpacked to int8. Activations are quantized to
// 8 bits in the same groups, with a scale per token and group. Products of a group are exact
// integers, and groups are added in float32 in order: a token's result does not depend on the other
// tokens of the batch.

#pragma once

#include <cmath>

#include "simd.h"

namespace {

inline int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }

struct TileRange {
  int64_t first, last;
};

#if defined(DOT_PRODUCTS)
using InputSums = int32_t;  // -ZERO * sum of x: corrects products with q + ZERO
#else
struct InputSums {
  int16_t parts[SUBGROUPS];
};
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline InputSums input_sums(__m128i parts) {
  parts = _mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0x4e));
  return -ZERO * _mm_cvtsi128_si32(_mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0xb1)));
}
#elif defined(__AVX2__)
inline InputSums input_sums(__m128i parts) {
  InputSums sums;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums.parts), _mm_packs_epi32(parts, parts));
  return sums;
}
#endif

// Quantized activations of some tokens. Those of a tile are contiguous, [tiles][groups][tokens of
// the tile][128]; so are their scales.
struct Inputs {
  int64_t tokens, groups, tiles;
  AlignedArray<int8_t> values;
  AlignedArray<float> scales;
  AlignedArray<InputSums> sums;  // of a group's inputs, as `product` uses them

  Inputs(int64_t tokens, int64_t groups)
      : groups(groups),
        values(aligned_array<int8_t>((tokens * groups + TILE) * GROUP)),  // whole tiles are read
        scales(aligned_array<float>(tokens * groups + TILE)),
        sums(aligned_array<InputSums>(tokens * groups)) {
    resize(tokens);
  }
  // To at most the initial number of tokens; all rows must then be quantized again.
  void resize(int64_t count) {
    tokens = count;
    tiles = (count + TILE - 1) / TILE;
  }
  // Tiles differ by one token at most.
  int64_t first(int64_t tile) const { return tile * tokens / tiles; }
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
  int64_t tiles_a_block() const { return std::max<int64_t>(1, L2_BYTES / (TILE * groups * GROUP)); }
  int64_t blocks() const { return (tiles + tiles_a_block() - 1) / tiles_a_block(); }
  // The tiles of a block: their inputs stay in L2 while all panels stream by.
  TileRange block(int64_t number) const {
    return {number * tiles_a_block(), std::min(tiles, (number + 1) * tiles_a_block())};
  }
  // Quantizes the activations [in] of a token.
  template <class T>
  void quantize_row(int64_t token, const T* row, int64_t in);
};

// Quantizes a group of 128 to 8 bits: value = round(x * 127 / max_abs), scale = max_abs / 127.
#if defined(__aarch64__)
inline void quantize_group(const float* x, int8_t* value, float* scale, InputSums* sums) {
  int32x4_t max_abs = vdupq_n_s32(0);  // compared as integers: a NaN is the largest
  for (int64_t i = 0; i < GROUP; i += 4)
    max_abs = vmaxq_s32(max_abs, vreinterpretq_s32_f32(vabsq_f32(vld1q_f32(x + i))));
  const int32_t bits = vmaxvq_s32(max_abs);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const float factor = largest == 0 ? 0.0f : 127.0f / largest;
  for (int64_t i = 0; i < GROUP; i += 8) {
    const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), factor))),
                    high = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), factor)));
    vst1_s8(value + i, vqmovn_s16(vcombine_s16(low, high)));
  }
  static_assert(ZERO == 0);
  *sums = 0;
  *scale = largest / 127.0f;
}
#elif defined(__AVX2__)
inline void quantize_group(const float* x, int8_t* value, float* scale, InputSums* sums) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i max_abs = _mm256_setzero_si256();  // compared as integers: a NaN is the largest
  for (int64_t i = 0; i < GROUP; i += 8) {
    max_abs = _mm256_max_epi32(max_abs,
                               _mm256_castps_si256(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i))));
  }
  __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(max_abs), _mm256_extracti128_si256(max_abs, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
  const __m256 factor = _mm256_set1_ps(largest == 0 ? 0.0f : 127.0f / largest);
  __m256i whole[4], parts[SUBGROUPS];
  for (int part = 0; part < SUBGROUPS; part++) {
    for (int i = 0; i < 4; i++)
      whole[i] =
          _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + part * SUBGROUP + 8 * i), factor));
    parts[part] = _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]),
                                   _mm256_add_epi32(whole[2], whole[3]));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                        _mm256_packs_epi32(whole[2], whole[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(value + part * SUBGROUP), packed);
  }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(parts[0], parts[1]),
                                        _mm256_hadd_epi32(parts[2], parts[3]));
  *sums = input_sums(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  *scale = largest / 127.0f;
}
#else
inline void quantize_group(const float* x, int8_t* value, float* scale, InputSums* sums) {
  float largest = 0;  // a NaN is the largest
  for (int64_t i = 0; i < GROUP; i++)
    if (largest == largest && !(std::fabs(x[i]) <= largest)) largest = std::fabs(x[i]);
  const float factor = largest == 0 ? 0.0f : 127.0f / largest;
  for (int64_t i = 0; i < GROUP; i++) value[i] = int8_t(std::lrint(x[i] * factor));
  *sums = 0;
  *scale = largest / 127.0f;
}
#endif

template <class T>
void Inputs::quantize_row(int64_t token, const T* row, int64_t in) {
  const int64_t tile = ((token + 1) * tiles - 1) / tokens, beside = size(tile);
  float wide[GROUP];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t have = std::min(GROUP, in - g * GROUP),
                  place = first(tile) * groups + g * beside + token - first(tile);
    int64_t i = 0;
    for (; i + PANEL <= have; i += PANEL) store(wide + i, load(row + g * GROUP + i));
    for (; i < GROUP; i++) wide[i] = i < have ? to_float(row[g * GROUP + i]) : 0.0f;
    quantize_group(wide, &values[place * GROUP], &scales[place], &sums[place]);
  }
}

// Filled in by the caller as 64-bit words.
struct Weight {
  int64_t bits;
  const uint8_t* values;
  const uint16_t *scales, *bias;
};

constexpr int64_t SUB_SCALE_BYTES = PANEL * SUBGROUPS;  // bytes before the weights of a 4-bit group
constexpr int64_t group_bytes(int64_t bits) {
  return PANEL * GROUP * bits / 8 + (bits == 4 ? SUB_SCALE_BYTES : 0);
}

#if defined(DOT_PRODUCTS)
// Yields the bytes q + ZERO of a group, four quads at a time, in order.
template <int BITS, int ZERO = ::ZERO>
struct Quads {
  const uint8_t* w;
  Bytes step, offset;

  explicit Quads(const uint8_t* group) : w(group) {}
  void load4(int first, Bytes (&quads)[4]) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        quads[i] = sub8(bytes(w + (first + i) * 4 * PANEL), splat8(int8_t(128 - ZERO)));
    } else {
      if (first % (SUBGROUP / 4) == 0) {
        const Bytes both = broadcast_byte(bytes(w), 4 * first / SUBGROUP);
        step = even_bytes(low_nibbles(both)),
        offset = sub8(splat8(int8_t(ZERO)), mul16(high_nibbles(both), step));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 4;
           i += 2) {  // no product exceeds 255, so one 16-bit multiply does two bytes
        const Bytes b = bytes(w + SUB_SCALE_BYTES + (first + i) * 2 * PANEL);
        quads[i] = add(mul16(low_nibbles(b), step), offset),
        quads[i + 1] = add(mul16(high_nibbles(b), step), offset);
      }
    }
  }
};

#endif

// A panel of a weight.
struct Panel {
  int64_t bits;
  bool tiled = false;  // unpacked to signed bytes, for AMX
  const uint8_t* values;
  const uint16_t* scales;

  Panel(const Weight& w, int64_t number, int64_t groups)
      : bits(w.bits),
        values(w.values + number * groups * group_bytes(w.bits)),
        scales(w.scales + number * groups * PANEL) {}

  // As it is read by some tiles; `buffer` is memory for 8 bits.
  void prepare([[maybe_unused]] const Inputs& inputs, [[maybe_unused]] TileRange tiles,
               [[maybe_unused]] uint8_t* buffer) {
#if defined(__AMX_INT8__)
    tiled = inputs.tokens >= MIN_TILE_ROWS;
    if (tiled && bits == 4) return unpack<4, 0>(inputs.groups, buffer);
    if (tiled) return unpack<8, 0>(inputs.groups, buffer);
#endif
#if defined(DOT_PRODUCTS)  // elsewhere 4-bit products are faster
    if (bits == 4 && tiles.last - tiles.first > 1) unpack<4, 128>(inputs.groups, buffer);
#endif
  }

#if defined(DOT_PRODUCTS)
  // To 8 bits, q + ZERO.
  template <int BITS, int ZERO>
  void unpack(int64_t groups, uint8_t* out) {
    const uint8_t* from = values;
    values = out, bits = 8;
    for (int64_t g = 0; g < groups; g++, from += group_bytes(BITS), out += group_bytes(8)) {
      Quads<BITS, ZERO> quads(from);
      for (int first = 0; first < QUADS; first += 4) {
        Bytes four[4];
        quads.load4(first, four);
        for (int i = 0; i < 4; i++) store(out + (first + i) * 4 * PANEL, four[i]);
      }
    }
  }
#endif
};

#if defined(__AMX_INT8__)
// Product of a tile of `count` tokens with a tiled panel -> out [16][16], whose rows from `count`
// on mean nothing. A group is two products of tiles, and its sums are added up while the next group
// is multiplied.
void product_of_tiles(const Panel& panel, const Inputs& inputs, int64_t first, int64_t count,
                      float* out) {
  constexpr int HALF = GROUP / 2;  // inputs in a tile register
  const uint8_t* w = panel.values;
  const uint16_t* scale = panel.scales;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  alignas(64) int32_t sums[2][TILE * PANEL];
  finish_stores();
  Floats total[TILE];
#pragma GCC unroll 16
  for (int m = 0; m < TILE; m++) total[m] = splat(0);
  const auto add_up = [&](const int32_t* sum) {
    const Floats step = load_half(scale);
#pragma GCC unroll 16
    for (int m = 0; m < TILE; m++) {
      const Ints row = _mm512_load_si512(sum + m * PANEL);
      total[m] = fma(mul(to_floats(row), splat(x_scale[m])), step, total[m]);
    }
    scale += PANEL, x_scale += count;
  };
  for (int64_t g = 0; g < inputs.groups; g++) {
    if (g % 2) {
      _tile_zero(1);
      _tile_loadd(4, x, GROUP);
      _tile_loadd(6, w, 4 * PANEL);
      _tile_dpbssd(1, 4, 6);
      _tile_loadd(5, x + HALF, GROUP);
      _tile_loadd(7, w + HALF * PANEL, 4 * PANEL);
      _tile_dpbssd(1, 5, 7);
      _tile_stored(1, sums[1], sizeof(int32_t) * PANEL);
    } else {
      _tile_zero(0);
      _tile_loadd(2, x, GROUP);
      _tile_loadd(6, w, 4 * PANEL);
      _tile_dpbssd(0, 2, 6);
      _tile_loadd(3, x + HALF, GROUP);
      _tile_loadd(7, w + HALF * PANEL, 4 * PANEL);
      _tile_dpbssd(0, 3, 7);
      _tile_stored(0, sums[0], sizeof(int32_t) * PANEL);
    }
    if (g) add_up(sums[(g - 1) % 2]);
    w += group_bytes(8), x += count * GROUP;
  }
  add_up(sums[(inputs.groups - 1) % 2]);
#pragma GCC unroll 16
  for (int m = 0; m < TILE; m++) store(out + m * PANEL, total[m]);
}
#endif

#if defined(DOT_PRODUCTS)
#if defined(__ARM_FEATURE_MATMUL_INT8)
// Product of a tile of M tokens with one panel -> out [M][16]. An instruction multiplies two tokens
// and two outputs, of eight inputs each; of an odd number of tokens the last one is taken twice.
template <int BITS, int M>
void product_of_pairs(const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  constexpr int PAIRS = (M + 1) / 2;
  const uint8_t* w = panel.values;
  const uint16_t* scale = panel.scales;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  Floats total[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) total[m] = splat(0);
  for (int64_t g = 0; g < inputs.groups; g++) {
    int32x4_t sum[PAIRS][8];  // two outputs of each token
#pragma GCC unroll 2
    for (int pair = 0; pair < PAIRS; pair++) {
#pragma GCC unroll 8
      for (int n = 0; n < 8; n++) sum[pair][n] = vdupq_n_s32(0);
    }
    Quads<BITS> quads(w);
    for (int quad = 0; quad < QUADS; quad += 4) {
      Bytes four[4];
      quads.load4(quad, four);
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        int8x16_t tokens[PAIRS];
#pragma GCC unroll 2
        for (int pair = 0; pair < PAIRS; pair++) {
          const int8_t* from = x + 2 * pair * GROUP + 4 * (quad + i);
          tokens[pair] = vcombine_s8(vld1_s8(from), vld1_s8(from + (2 * pair + 1 < M) * GROUP));
        }
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {
          const int32x4_t a = vreinterpretq_s32_u8(four[i].v[n / 2]),
                          b = vreinterpretq_s32_u8(four[i + 1].v[n / 2]);
          const int8x16_t outputs = vreinterpretq_s8_s32(n % 2 ? vzip2q_s32(a, b) : vzip1q_s32(a, b));
#pragma GCC unroll 2
          for (int pair = 0; pair < PAIRS; pair++)
            sum[pair][n] = vmmlaq_s32(sum[pair][n], tokens[pair], outputs);
        }
      }
    }
    const Floats step = load_half(scale);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const Ints row = each<Ints>([&](int i) {
        const int64x2_t a = vreinterpretq_s64_s32(sum[m / 2][2 * i]),
                        b = vreinterpretq_s64_s32(sum[m / 2][2 * i + 1]);
        return vreinterpretq_s32_s64(m % 2 ? vtrn2q_s64(a, b) : vtrn1q_s64(a, b));
      });
      total[m] = fma(mul(to_floats(row), splat(x_scale[m])), step, total[m]);
    }
    w += group_bytes(BITS), scale += PANEL, x += M * GROUP, x_scale += M;
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) store(out + m * PANEL, total[m]);
}
#endif

// Product of a tile of M tokens with one panel -> out [M][16].
template <int BITS, int M>
void product(const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (M > 1) return product_of_pairs<BITS, M>(panel, inputs, first, out);
#endif
  // independent sums, to hide the latency of the dot product
  constexpr int CHAINS = !ZERO || M >= 4 ? 1 : ACCUMULATORS > 6 ? 4 : 2;
  const uint8_t* w = panel.values;
  const uint16_t* scale = panel.scales;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  const InputSums* x_sums = &inputs.sums[first * inputs.groups];
  Floats total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) total[m] = splat(0);
  for (int64_t g = 0; g < inputs.groups; g++) {
    Ints sum[CHAINS][M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      sum[0][m] = splat32(x_sums[m]);
#pragma GCC unroll 16
      for (int chain = 1; chain < CHAINS; chain++) sum[chain][m] = splat32(0);
    }
    Quads<BITS> quads(w);
#pragma GCC unroll 2
    for (int first = 0; first < QUADS; first += 4) {
      Bytes four[4];
      quads.load4(first, four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
          dot(sum[i % CHAINS][m], four[i], x + m * GROUP + 4 * (first + i));
      }
    }
    const Floats step = load_half(scale);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
      for (int chain = 1; chain < CHAINS; chain++) sum[0][m] = add32(sum[0][m], sum[chain][m]);
      total[m] = fma(mul(to_floats(sum[0][m]), splat(x_scale[m])), step, total[m]);
    }
    w += group_bytes(BITS), scale += PANEL, x += M * GROUP, x_scale += M, x_sums += M;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) store(out + m * PANEL, total[m]);
}
#else
// In assembly: the compiler would compute many products first and spill them to memory.
// The sum of two unsigned-by-signed 8-bit products can overflow 16 bits, so signs move to the
// inputs; with 4 bits it cannot.
inline void dot(__m256i& sum, __m256i q, __m256i size, const int8_t* quad, __m256i ones) {
  __m256i two;
  asm("vpbroadcastd %2, %1\n\tvpsignb %3, %1, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, "
      "%1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(two)
      : "m"(*reinterpret_cast<const Word*>(quad)), "x"(q), "x"(size), "x"(ones));
}
inline void dot(__m256i& products, __m256i u, const int8_t* quad) {
  __m256i two;
  asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %1\n\tvpaddw %1, %0, %0"
      : "+x"(products), "=&x"(two)
      : "m"(*reinterpret_cast<const Word*>(quad)), "x"(u));
}
inline __m256i eight(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}  // outputs
inline __m256i words(__m256i fours, int one,
                     int other) {  // bytes `one` and `other` of each four, widened to 16 bits
  const __m256i first =
      _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c));
  return _mm256_shuffle_epi8(
      fours, _mm256_add_epi8(first, _mm256_set1_epi32(0x80008000 | other << 16 | one)));
}

// Integer products of one group: N times 8 outputs for M tokens, whose inputs are GROUP bytes
// apart.
template <int M, int N>
void eight_bits(const uint8_t* w, const int8_t* x, const InputSums*, __m256i (&sum)[M][N]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) sum[m][n] = _mm256_setzero_si256();
  }
#pragma GCC unroll 2
  for (int quad = 0; quad < QUADS; quad++) {
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      const __m256i q = _mm256_xor_si256(eight(w + quad * 4 * PANEL + n * 32),
                                         _mm256_set1_epi8(-128)),
                    size = _mm256_abs_epi8(q);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) dot(sum[m][n], q, size, x + m * GROUP + quad * 4, ones);
    }
  }
}

// The same with 4-bit weights: the products q_uint4 * x of a subgroup fit 16 bits, |x| <= 127, and
// the multiplication with sub_scale adds them up in 32. Subtracted is sub_scale * zero_point * the
// sum of the subgroup's x.
template <int M, int N>
void four_bits(const uint8_t* w, const int8_t* x, const InputSums* x_sums, __m256i (&sum)[M][N]) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i steps[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    const __m256i both = eight(w + n * 32);
    const __m256i step = steps[n] = _mm256_and_si256(both, low),
                  zero_point = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    for (int part = 0; part < SUBGROUPS; part += 2) {
      const __m256i offset =
          _mm256_mullo_epi16(words(step, part, part + 1), words(zero_point, part, part + 1));
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const __m256i much = _mm256_madd_epi16(
            offset, _mm256_set1_epi32(*reinterpret_cast<const Word*>(&x_sums[m].parts[part])));
        sum[m][n] = _mm256_sub_epi32(part ? sum[m][n] : _mm256_setzero_si256(), much);
      }
    }
  }
  for (int part = 0; part < SUBGROUPS; part++) {
    __m256i products[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) products[m][n] = _mm256_setzero_si256();
    }
    for (int i = 0; i < SUBGROUP / 8; i++) {  // two quads
      const int at = part * SUBGROUP + i * 8;
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        const __m256i both = eight(w + SUB_SCALE_BYTES + at * PANEL / 2 + n * 32);
        const __m256i one = _mm256_and_si256(both, low),
                      other = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          dot(products[m][n], one, x + m * GROUP + at);
          dot(products[m][n], other, x + m * GROUP + at + 4);
        }
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      const __m256i step = words(steps[n], part, part);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        sum[m][n] = _mm256_add_epi32(sum[m][n], _mm256_madd_epi16(products[m][n], step));
    }
  }
}

// N times 8 outputs of M tokens, over one group of inputs: added to out [M][16], or stored if it is
// the first group.
template <int BITS, int M, int N>
void group(const uint8_t* w, const uint16_t* scale, const int8_t* x, const float* x_scale,
           const InputSums* x_sums, bool is_first, float* out) {
  __m256i sum[M][N];
  (BITS == 4 ? four_bits<M, N> : eight_bits<M, N>)(w, x, x_sums, sum);
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    const __m256 step =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + n * 8)));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      float* to = out + m * PANEL + n * 8;
      const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m][n]), _mm256_set1_ps(x_scale[m]));
      _mm256_storeu_ps(
          to, _mm256_fmadd_ps(y, step, is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(to)));
    }
  }
}

// Product of a tile of M tokens with one panel -> out [M][16].
template <int BITS, int M>
void product(const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  constexpr int MAX_SUMS = BITS == 4 ? 6 : 12;  // sums of 8 outputs that fit the registers
  constexpr int SOME = M > MAX_SUMS ? (M + 1) / 2 : M, N = 2 * SOME <= MAX_SUMS ? 2 : 1,
                REST = M - SOME;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  const InputSums* x_sums = &inputs.sums[first * inputs.groups];
  for (int64_t g = 0; g < inputs.groups; g++, x += M * GROUP, x_scale += M, x_sums += M) {
    const uint8_t* w = panel.values + g * group_bytes(BITS);
    for (int n = 0; n < 2; n += N) {
      const uint16_t* scale = panel.scales + g * PANEL + n * 8;
      group<BITS, SOME, N>(w + n * 32, scale, x, x_scale, x_sums, g == 0, out + n * 8);
      if constexpr (REST > 0) {
        group<BITS, REST, N>(w + n * 32, scale, x + SOME * GROUP, x_scale + SOME, x_sums + SOME,
                             g == 0, out + SOME * PANEL + n * 8);
      }
    }
  }
}
#endif

template <int BITS, int M = MAX_ROWS>
void product(int64_t count, const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  if (count == M) return product<BITS, M>(panel, inputs, first, out);
  if constexpr (M > 1) product<BITS, M - 1>(count, panel, inputs, first, out);
}

// The same for a tile of any size -> out [tokens of the tile][16].
void product(const Panel& panel, const Inputs& inputs, int64_t tile, float* out) {
#if defined(__AMX_INT8__)
  if (panel.tiled)
    return product_of_tiles(panel, inputs, inputs.first(tile), inputs.size(tile), out);
#endif
  (panel.bits == 4 ? product<4> : product<8>)(inputs.size(tile), panel, inputs, inputs.first(tile),
                                              out);
}

// Memory for one or two panels unpacked to 8 bits.
class UnpackBuffer {
 public:
  explicit UnpackBuffer(int64_t groups)
      : groups(groups), buffer(aligned_array<uint8_t>(2 * groups * group_bytes(8))) {}
  // A panel for some tiles; `half` chooses the half of the buffer.
  Panel panel(const Weight& w, int64_t number, const Inputs& inputs, TileRange tiles,
              int64_t half = 0) const {
    Panel found(w, number, inputs.groups);
    found.prepare(inputs, tiles, &buffer[half * groups * group_bytes(8)]);
    return found;
  }

 private:
  int64_t groups;
  AlignedArray<uint8_t> buffer;
};

template <class T>
struct Linear {
  Weight weight;
  const T *x, *bias;
  T* y;
  int64_t in, out, panels;
  Inputs inputs;

  static void quantize_rows(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Linear*>(context);
    for (int64_t token = begin; token < end; token++)
      self.inputs.quantize_row(token, self.x + token * self.in, self.in);
  }

  static void multiply_panels(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Linear*>(context);
    const UnpackBuffer unpack_buffer(self.inputs.groups);
    const TileRegisters registers;
    for (int64_t number = begin; number < end; number++) {
      const TileRange tiles = self.inputs.block(number / self.panels);
      const Panel panel =
          unpack_buffer.panel(self.weight, number % self.panels, self.inputs, tiles);
      for (int64_t tile = tiles.first; tile < tiles.last; tile++)
        self.multiply(panel, tile, number % self.panels * PANEL);
    }
  }

  void multiply(const Panel& panel, int64_t tile, int64_t at) const {
    float rows[TILE * PANEL];
    product(panel, inputs, tile, rows);
    const int64_t width = std::min(PANEL, out - at);
    for (int64_t m = 0; m < inputs.size(tile); m++) {
      T* to = y + (inputs.first(tile) + m) * out + at;
      if (width == PANEL) {
        store(to, add(load(rows + m * PANEL), bias ? load(bias + at) : splat(0)));
        continue;
      }
      for (int64_t i = 0; i < width; i++)
        store_scalar(to + i, rows[m * PANEL + i] + (bias ? to_float(bias[at + i]) : 0));
    }
  }
};

template <class T>
void linear(ParallelFor parallel_for, int32_t bits, const void* x, const uint8_t* weight,
            const uint16_t* scale, const void* bias, void* y, int64_t tokens, int64_t in,
            int64_t out) {
  if (!tokens) return;
  const int64_t groups = groups_of(in), panels = (out + PANEL - 1) / PANEL;
  Linear<T> self{{bits, weight, scale, nullptr},
                 static_cast<const T*>(x),
                 static_cast<const T*>(bias),
                 static_cast<T*>(y),
                 in,
                 out,
                 panels,
                 Inputs(tokens, groups)};
  const Inputs& inputs = self.inputs;
  parallel_for(0, tokens, std::max<int64_t>(1, MIN_PARALLEL_WORK / (groups * GROUP)),
               Linear<T>::quantize_rows, &self);
  const int64_t work = PANEL * groups * GROUP * std::min(tokens, inputs.tiles_a_block() * TILE);
  parallel_for(0, inputs.blocks() * panels, std::max<int64_t>(1, MIN_PARALLEL_WORK / work),
               Linear<T>::multiply_panels, &self);
}

}  // namespace
