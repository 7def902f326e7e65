// Products with quantised weights, attention, and the layers of a decoder and of an image tower made of both, for x86 with
// AVX-512 VNNI (and BF16) or AVX2: the flags say. A plain C interface without PyTorch's headers; the threads are PyTorch's own,
// handed in as its torch_parallel_for.
//
// A weight [out, in] lies in panels of 16 outputs and groups of 128 inputs, in the order in which it is read:
//   8 bits: [panels][groups][32 quads][16 outputs][4 inputs], each byte q + 128
//   4 bits: [panels][groups], of each first [16 outputs][4 parts of 32 inputs], the bytes step + 16 * nought, then
//           [16 pairs of quads][16 outputs][4 inputs], u of the pair's first quad in the low halves; q = step * (u - nought)
//   scales: [panels][groups][16 outputs], float16
// All q are from -128 to 127, so that weights of 4 bits are unpacked to those of 8. Inputs are quantised to 8 bits in the same
// groups, a scale for each token and group. Products of a group are exact integers, groups are added in float32 in order: a
// token's result does not depend on how many others are computed with it.

#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

constexpr int64_t GROUP = 128, PART = 32, PANEL = 16;
constexpr int QUADS = GROUP / 4, PARTS = GROUP / PART;
constexpr int64_t SERIAL = 1 << 17;  // multiplications that are not worth waking another thread for
constexpr int64_t NEAR = 256 << 10;  // bytes of inputs that stay in a core's second-level cache while weights pass by

typedef int32_t __attribute__((__may_alias__)) Word;  // four numbers of 8 bits, or two of 16

constexpr int64_t TILE = 12;  // tokens that share a pass over a panel

// Sixteen lanes, one an output of a panel.
#if defined(__AVX512VNNI__)
constexpr int64_t ROWS = 12;  // queries that share a pass over keys and values
constexpr int SUMS = 24;      // of attention, that the registers hold
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
inline Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline Bytes all(int8_t n) { return _mm512_set1_epi8(n); }
inline Bytes low(Bytes b) { return _mm512_and_si512(b, all(15)); }
inline Bytes high(Bytes b) { return low(_mm512_srli_epi16(b, 4)); }
inline Bytes even(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi16(255)); }
inline Bytes each(Bytes fours, int i) {  // the i-th byte of each four, four times
  return _mm512_shuffle_epi8(fours, _mm512_add_epi8(all(i), _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c))));
}
inline Bytes times(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, b); }  // of 16 bits
inline Bytes plus(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes minus(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
inline Ints ints(int32_t n) { return _mm512_set1_epi32(n); }
inline Ints plus32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline void dot(Ints& sum, Bytes w, const int8_t* quad) {  // as the compiler would not: it copies sums and broadcasts apart
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Word*>(quad)));
}
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints n) { return _mm512_cvtepi32_ps(n); }
inline Floats halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }  // bfloat16
inline Floats load(const uint16_t* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats by_sign(Floats x, Floats plus, Floats minus) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), plus, minus);
}
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats shift(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x * 2 ** n
inline Floats floats(const uint16_t* p, int64_t have) { return widened(_mm256_maskz_loadu_epi16((1u << have) - 1, p)); }
inline Floats floats(const int8_t* p, int64_t have) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((1u << have) - 1, p)));
}
inline __m256i to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
#endif
}
#else
constexpr int64_t ROWS = 6;
constexpr int SUMS = 6;
struct Floats { __m256 a, b; };
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats halves(const uint16_t* p) {
  auto q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }  // bfloat16
inline Floats widened(__m256i x) { return {widened(_mm256_castsi256_si128(x)), widened(_mm256_extracti128_si256(x, 1))}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const uint16_t* p) {
  auto q = reinterpret_cast<const __m128i*>(p);
  return {widened(_mm_loadu_si128(q)), widened(_mm_loadu_si128(q + 1))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats plus(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline Floats most(Floats a, Floats b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline Floats least(Floats a, Floats b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
inline Floats by_sign(Floats x, Floats plus, Floats minus) {
  return {_mm256_blendv_ps(plus.a, minus.a, x.a), _mm256_blendv_ps(plus.b, minus.b, x.b)};
}
inline __m256 nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats nearest(Floats x) { return {nearest(x.a), nearest(x.b)}; }
inline __m256 shift(__m256 x, __m256 n) {  // n is above -127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats shift(Floats x, Floats n) { return {shift(x.a, n.a), shift(x.b, n.b)}; }
inline Floats floats(const uint16_t* p, int64_t have) {
  uint16_t some[16] = {};
  return load(have < 16 ? static_cast<const uint16_t*>(std::memcpy(some, p, have * sizeof(uint16_t))) : p);
}
inline Floats floats(const int8_t* p, int64_t have) {
  int8_t some[16] = {};
  if (have < 16) p = static_cast<const int8_t*>(std::memcpy(some, p, have));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
inline __m256i to_bfloat16(__m256 x) {  // in lanes of 32 bits
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  return _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256i to_bfloat16(Floats x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bfloat16(x.a), to_bfloat16(x.b)), 0xd8);
}
#endif

inline void store(uint16_t* p, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x)); }

// Products of attention are of bfloat16, with sums in float32: so many rows of keys or values at once as one instruction takes.
#if defined(__AVX512BF16__)
constexpr int64_t DEEP = 2;
using Factor = uint16_t;  // of the queries and shares, bfloat16
using Deep = __m512i;     // sixteen lanes of two bfloat16
inline Deep deep(const uint16_t* first, const uint16_t* second, int64_t have) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  const __mmask16 there = (1u << have) - 1;
  const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(there, first));
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(a, _mm256_maskz_loadu_epi16(there, second), 1));
}
inline Deep deep(const int8_t* first, const int8_t* second, int64_t have) {  // whole numbers of 8 bits have no lower halves
  const __m512i a = _mm512_castps_si512(floats(first, have)), b = _mm512_castps_si512(floats(second, have));
  return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
}
inline void dot(Floats& sum, Deep b, const Factor* a) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const Word*>(a)));
}
inline void store_factors(Factor* p, Floats x) { store(p, x); }
#else
constexpr int64_t DEEP = 1;
using Factor = float;  // with the digits of bfloat16
using Deep = Floats;
template <class S>
Deep deep(const S* row, const S*, int64_t have) { return floats(row, have); }
inline void dot(Floats& sum, Deep b, const Factor* a) { sum = fma(b, splat(*a), sum); }
inline void store_factors(Factor* p, Floats x) { store(p, widened(to_bfloat16(x))); }
#endif

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {  // bfloat16
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float half(uint16_t x) { return _cvtsh_ss(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) {  // bfloat16, to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline void factor(uint16_t* to, uint16_t x) { *to = x; }
inline void factor(float* to, uint16_t x) { *to = to_float(x); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

// Numbers from the beginning of a cache line on, so that no vector lies in two; many in large pages, where the system has them.
template <class T>
Array<T> array(int64_t count) {
  constexpr size_t line = 64, page = 2 << 20;
  const size_t size = count * sizeof(T), unit = size < 2 * page ? line : page, room = std::max<size_t>(1, (size + unit - 1) / unit) * unit;
  void* p = std::aligned_alloc(unit, room);
  if (!p) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (unit == page) madvise(p, room, MADV_HUGEPAGE);
#endif
  return Array<T>(static_cast<T*>(p));
}

inline int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }

struct Tiles {
  int64_t first, last;
};

#if defined(__AVX512VNNI__)
using Sums = int32_t;  // what products have too much, as weights are q + 128, less than nought
inline Sums summed(__m128i parts) {
  parts = _mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0x4e));
  return -128 * _mm_cvtsi128_si32(_mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0xb1)));
}
#else
struct Sums { int16_t parts[PARTS]; };
inline Sums summed(__m128i parts) {
  Sums found;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(found.parts), _mm_packs_epi32(parts, parts));
  return found;
}
#endif

// Inputs of some tokens, quantised. Those of a tile lie together, [tiles][groups][tokens of the tile][128], and so do scales.
struct Inputs {
  int64_t tokens, groups, tiles;
  Array<int8_t> values;
  Array<float> scales;
  Array<Sums> sums;        // of the inputs of a group, as `product` uses them

  Inputs(int64_t tokens, int64_t groups)
      : groups(groups), values(array<int8_t>(tokens * groups * GROUP)), scales(array<float>(tokens * groups)),
        sums(array<Sums>(tokens * groups)) {
    hold(tokens);
  }
  void hold(int64_t count) {  // no more than there is room for, to be put anew
    tokens = count;
    tiles = (count + TILE - 1) / TILE;
  }
  int64_t first(int64_t tile) const { return tile * tokens / tiles; }  // tiles are as equal as they can be
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
  int64_t tiles_a_block() const { return std::max<int64_t>(1, NEAR / (TILE * groups * GROUP)); }
  int64_t blocks() const { return (tiles + tiles_a_block() - 1) / tiles_a_block(); }
  // The tiles of a block, whose inputs stay near while one panel after another passes.
  Tiles block(int64_t number) const {
    return {number * tiles_a_block(), std::min(tiles, (number + 1) * tiles_a_block())};
  }
  // The numbers of a token [in].
  template <class T>
  void put(int64_t token, const T* row, int64_t in);
};

// 128 numbers to 8 bits: value = round(x * 127 / largest), scale = largest / 127.
inline void quantise(const float* x, int8_t* value, float* scale, Sums* sums) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i most = _mm256_setzero_si256();  // as integers, so that a NaN is the largest
  for (int64_t i = 0; i < GROUP; i += 8) {
    most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i))));
  }
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
  const __m256 factor = _mm256_set1_ps(largest == 0 ? 0.0f : 127.0f / largest);
  __m256i whole[4], parts[PARTS];
  for (int part = 0; part < PARTS; part++) {
    for (int i = 0; i < 4; i++) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + part * PART + 8 * i), factor));
    parts[part] = _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3]));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(value + part * PART), packed);
  }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(parts[0], parts[1]), _mm256_hadd_epi32(parts[2], parts[3]));
  *sums = summed(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  *scale = largest / 127.0f;
}

template <class T>
void Inputs::put(int64_t token, const T* row, int64_t in) {
  const int64_t tile = ((token + 1) * tiles - 1) / tokens, beside = size(tile);
  float wide[GROUP];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t have = std::min(GROUP, in - g * GROUP), place = first(tile) * groups + g * beside + token - first(tile);
    int64_t i = 0;
    for (; i + PANEL <= have; i += PANEL) store(wide + i, load(row + g * GROUP + i));
    for (; i < GROUP; i++) wide[i] = i < have ? to_float(row[g * GROUP + i]) : 0.0f;
    quantise(wide, &values[place * GROUP], &scales[place], &sums[place]);
  }
}

// As the caller lays it out, in words of 64 bits.
struct Weight {
  int64_t bits;
  const uint8_t* values;
  const uint16_t *scales, *bias;
};

constexpr int64_t STEPS = PANEL * PARTS;  // bytes before a group of 4 bits
constexpr int64_t group_bytes(int64_t bits) { return PANEL * GROUP * bits / 8 + (bits == 4 ? STEPS : 0); }

#if defined(__AVX512VNNI__)
// The bytes q + 128 of a group, four quads at a time, from the first to the last.
template <int BITS>
struct Quads {
  const uint8_t* w;
  Bytes step, more;

  explicit Quads(const uint8_t* group) : w(group) {}
  void four(int first, Bytes (&quads)[4]) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) quads[i] = bytes(w + (first + i) * 4 * PANEL);
    } else {
      if (first % (PART / 4) == 0) {
        const Bytes both = each(bytes(w), 4 * first / PART);
        step = even(low(both)), more = minus(all(-128), times(high(both), step));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {  // no product is above 255, so that one of 16 bits multiplies two
        const Bytes b = bytes(w + STEPS + (first + i) * 2 * PANEL);
        quads[i] = plus(times(low(b), step), more), quads[i + 1] = plus(times(high(b), step), more);
      }
    }
  }
};

#endif

// A panel of a weight, as `product` reads it.
struct Panel {
  int64_t bits;
  const uint8_t* values;
  const uint16_t* scales;

  Panel(const Weight& w, int64_t number, int64_t groups)
      : bits(w.bits), values(w.values + number * groups * group_bytes(w.bits)), scales(w.scales + number * groups * PANEL) {}

#if defined(__AVX512VNNI__)
  static constexpr bool UNPACKED = true;
  // Of 4 bits for several tiles: unpacked to 8, into room for that.
  void unpack(int64_t groups, uint8_t* room) {
    const uint8_t* from = values;
    values = room, bits = 8;
    for (int64_t g = 0; g < groups; g++, from += group_bytes(4), room += group_bytes(8)) {
      Quads<4> quads(from);
      for (int first = 0; first < QUADS; first += 4) {
        Bytes four[4];
        quads.four(first, four);
        for (int i = 0; i < 4; i++) store(room + (first + i) * 4 * PANEL, four[i]);
      }
    }
  }
#else
  static constexpr bool UNPACKED = false;  // products of 4 bits are faster
  void unpack(int64_t, uint8_t*) {}
#endif
};

#if defined(__AVX512VNNI__)
// A tile of M tokens by one panel -> [M][16].
template <int BITS, int M>
void product(const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  constexpr int CHAINS = M < 4 ? 4 : 1;  // of sums, so that none waits for the one before
  const uint8_t* w = panel.values;
  const uint16_t* scale = panel.scales;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  const Sums* x_sums = &inputs.sums[first * inputs.groups];
  Floats total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) total[m] = splat(0);
  for (int64_t g = 0; g < inputs.groups; g++) {
    Ints sum[CHAINS][M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      sum[0][m] = ints(x_sums[m]);
#pragma GCC unroll 16
      for (int chain = 1; chain < CHAINS; chain++) sum[chain][m] = ints(0);
    }
    Quads<BITS> quads(w);
#pragma GCC unroll 2
    for (int first = 0; first < QUADS; first += 4) {
      Bytes four[4];
      quads.four(first, four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) dot(sum[i % CHAINS][m], four[i], x + m * GROUP + 4 * (first + i));
      }
    }
    const Floats step = halves(scale);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
      for (int chain = 1; chain < CHAINS; chain++) sum[0][m] = plus32(sum[0][m], sum[chain][m]);
      total[m] = fma(mul(to_floats(sum[0][m]), splat(x_scale[m])), step, total[m]);
    }
    w += group_bytes(BITS), scale += PANEL, x += M * GROUP, x_scale += M, x_sums += M;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) store(out + m * PANEL, total[m]);
}
#else
// Steps that keep one number beside the sums: left to itself the compiler computes many products first, and puts them into memory.
// Two products of a byte without a sign need not fit 16 bits, so signs go to the inputs; with four bits they do.
inline void dot(__m256i& sum, __m256i q, __m256i size, const int8_t* quad, __m256i ones) {
  __m256i two;
  asm("vpbroadcastd %2, %1\n\tvpsignb %3, %1, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(two) : "m"(*reinterpret_cast<const Word*>(quad)), "x"(q), "x"(size), "x"(ones));
}
inline void dot(__m256i& products, __m256i u, const int8_t* quad) {
  __m256i two;
  asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %1\n\tvpaddw %1, %0, %0"
      : "+x"(products), "=&x"(two) : "m"(*reinterpret_cast<const Word*>(quad)), "x"(u));
}
inline __m256i eight(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }  // outputs
inline __m256i words(__m256i fours, int one, int other) {  // of each four bytes these two, in 16 bits
  const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c));
  return _mm256_shuffle_epi8(fours, _mm256_add_epi8(first, _mm256_set1_epi32(0x80008000 | other << 16 | one)));
}

// N times 8 outputs of a group for M tokens, whose inputs lie GROUP from each other: sums of products.
template <int M, int N>
void eight_bits(const uint8_t* w, const int8_t* x, const Sums*, __m256i (&sum)[M][N]) {
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
      const __m256i q = _mm256_xor_si256(eight(w + quad * 4 * PANEL + n * 32), _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(q);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) dot(sum[m][n], q, size, x + m * GROUP + quad * 4, ones);
    }
  }
}

// The same with weights of 4 bits: a part's products u * x fit 16 bits, |x| <= 127, and what multiplies them by the part's step
// adds them up in 32. What they have too much is step * nought * the sum of the part's x.
template <int M, int N>
void four_bits(const uint8_t* w, const int8_t* x, const Sums* x_sums, __m256i (&sum)[M][N]) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i steps[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    const __m256i both = eight(w + n * 32);
    const __m256i step = steps[n] = _mm256_and_si256(both, low), nought = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    for (int part = 0; part < PARTS; part += 2) {
      const __m256i more = _mm256_mullo_epi16(words(step, part, part + 1), words(nought, part, part + 1));
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const __m256i much = _mm256_madd_epi16(more, _mm256_set1_epi32(*reinterpret_cast<const Word*>(&x_sums[m].parts[part])));
        sum[m][n] = _mm256_sub_epi32(part ? sum[m][n] : _mm256_setzero_si256(), much);
      }
    }
  }
  for (int part = 0; part < PARTS; part++) {
    __m256i products[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) products[m][n] = _mm256_setzero_si256();
    }
    for (int i = 0; i < PART / 8; i++) {  // two quads
      const int at = part * PART + i * 8;
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        const __m256i both = eight(w + STEPS + at * PANEL / 2 + n * 32);
        const __m256i one = _mm256_and_si256(both, low), other = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
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
      for (int m = 0; m < M; m++) sum[m][n] = _mm256_add_epi32(sum[m][n], _mm256_madd_epi16(products[m][n], step));
    }
  }
}

// N times 8 outputs of M tokens, a group of all their inputs: added to out [M][16], or put there.
template <int BITS, int M, int N>
void group(const uint8_t* w, const uint16_t* scale, const int8_t* x, const float* x_scale, const Sums* x_sums, bool put, float* out) {
  __m256i sum[M][N];
  (BITS == 4 ? four_bits<M, N> : eight_bits<M, N>)(w, x, x_sums, sum);
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    const __m256 step = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + n * 8)));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      float* to = out + m * PANEL + n * 8;
      const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m][n]), _mm256_set1_ps(x_scale[m]));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(y, step, put ? _mm256_setzero_ps() : _mm256_loadu_ps(to)));
    }
  }
}

// A tile of M tokens by one panel -> [M][16].
template <int BITS, int M>
void product(const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  constexpr int MOST = BITS == 4 ? 6 : 12;  // sums of 8 outputs that the registers hold
  constexpr int SOME = M > MOST ? (M + 1) / 2 : M, N = 2 * SOME <= MOST ? 2 : 1, REST = M - SOME;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  const Sums* x_sums = &inputs.sums[first * inputs.groups];
  for (int64_t g = 0; g < inputs.groups; g++, x += M * GROUP, x_scale += M, x_sums += M) {
    const uint8_t* w = panel.values + g * group_bytes(BITS);
    for (int n = 0; n < 2; n += N) {
      const uint16_t* scale = panel.scales + g * PANEL + n * 8;
      group<BITS, SOME, N>(w + n * 32, scale, x, x_scale, x_sums, g == 0, out + n * 8);
      if constexpr (REST > 0) {
        group<BITS, REST, N>(w + n * 32, scale, x + SOME * GROUP, x_scale + SOME, x_sums + SOME, g == 0, out + SOME * PANEL + n * 8);
      }
    }
  }
}
#endif

template <int BITS, int M = TILE>
void product(int64_t count, const Panel& panel, const Inputs& inputs, int64_t first, float* out) {
  if (count == M) return product<BITS, M>(panel, inputs, first, out);
  if constexpr (M > 1) product<BITS, M - 1>(count, panel, inputs, first, out);
}

// The same for the tokens of any tile -> [tokens of the tile][16].
void product(const Panel& panel, const Inputs& inputs, int64_t tile, float* out) {
  (panel.bits == 4 ? product<4> : product<8>)(inputs.size(tile), panel, inputs, inputs.first(tile), out);
}

// Room for what is unpacked of one panel, or of two.
class Unpacked {
 public:
  explicit Unpacked(int64_t groups) : groups(groups), room(array<uint8_t>(2 * groups * group_bytes(8))) {}
  // A panel for some tiles, in the first or the second half of the room.
  Panel panel(const Weight& w, int64_t number, const Inputs& inputs, Tiles tiles, int64_t half = 0) const {
    Panel found(w, number, inputs.groups);
    if (Panel::UNPACKED && found.bits == 4 && tiles.last - tiles.first > 1) found.unpack(inputs.groups, &room[half * groups * group_bytes(8)]);
    return found;
  }

 private:
  int64_t groups;
  Array<uint8_t> room;
};

template <class T>
struct Linear {
  Weight weight;
  const T *x, *bias;
  T* y;
  int64_t in, out, panels;
  Inputs inputs;

  static void quantise_some(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Linear*>(context);
    for (int64_t token = begin; token < end; token++) self.inputs.put(token, self.x + token * self.in, self.in);
  }

  static void multiply_some(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Linear*>(context);
    const Unpacked unpacked(self.inputs.groups);
    for (int64_t number = begin; number < end; number++) {
      const Tiles tiles = self.inputs.block(number / self.panels);
      const Panel panel = unpacked.panel(self.weight, number % self.panels, self.inputs, tiles);
      for (int64_t tile = tiles.first; tile < tiles.last; tile++) self.multiply(panel, tile, number % self.panels * PANEL);
    }
  }

  void multiply(const Panel& panel, int64_t tile, int64_t at) const {
    float rows[TILE * PANEL];
    product(panel, inputs, tile, rows);
    const int64_t width = std::min(PANEL, out - at);
    for (int64_t m = 0; m < inputs.size(tile); m++) {
      T* to = y + (inputs.first(tile) + m) * out + at;
      if (width == PANEL) {
        store(to, plus(load(rows + m * PANEL), bias ? load(bias + at) : splat(0)));
        continue;
      }
      for (int64_t i = 0; i < width; i++) put(to + i, rows[m * PANEL + i] + (bias ? to_float(bias[at + i]) : 0));
    }
  }
};

template <class T>
void linear(ParallelFor parallel_for, int32_t bits, const void* x, const uint8_t* weight, const uint16_t* scale, const void* bias,
            void* y, int64_t tokens, int64_t in, int64_t out) {
  if (!tokens) return;
  const int64_t groups = groups_of(in), panels = (out + PANEL - 1) / PANEL;
  Linear<T> self{{bits, weight, scale, nullptr}, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), in,
                 out, panels, Inputs(tokens, groups)};
  const Inputs& inputs = self.inputs;
  parallel_for(0, tokens, std::max<int64_t>(1, SERIAL / (groups * GROUP)), Linear<T>::quantise_some, &self);
  const int64_t work = PANEL * groups * GROUP * std::min(tokens, inputs.tiles_a_block() * TILE);
  parallel_for(0, inputs.blocks() * panels, std::max<int64_t>(1, SERIAL / work), Linear<T>::multiply_some, &self);
}

// e ** x for x <= 0, to 2e-7 of it (the series of e ** r up to r ** 6, |r| <= ln 2 / 2).
inline Floats exponential(Floats x) {
  x = most(splat(-87.0f), x);  // in this order a NaN stays one
  const Floats n = nearest(mul(x, splat(1.44269504f)));
  const Floats r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Floats y = splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, splat(c));
  return shift(y, n);
}

// 1 / (1 + e ** -x)
inline Floats sigmoid(Floats x) {
  const Floats e = exponential(least(x, mul(x, splat(-1))));
  return div(by_sign(x, splat(1), e), plus(e, splat(1)));
}

inline int64_t whole(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// c[m][0..16 N) = sum over k of a[m][k] * b[k][0..16 N), DEEP k at a time and in order, whatever M and N are. Of b's rows there
// are `depth`, of a's columns whole DEEPs; of b's columns `have`, where N is 1. b is asked for `ahead` of its use.
template <int M, int N, class S>
void combine_panels(const Factor* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth, int64_t have, int64_t ahead,
                    float* c, int64_t c_stride) {
  static const S nought[N * PANEL] = {};
  Floats sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sum[m][n] = splat(0);
  }
  for (int64_t k = 0; k < depth; k += DEEP, a += DEEP, b += DEEP * b_stride) {
    const S* other = k + 1 < depth ? b + b_stride : nought;
    Deep some[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) some[n] = deep(b + n * PANEL, other + n * PANEL, have);
    for (size_t line = 0; line < N * PANEL * sizeof(S); line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(b + ahead) + line, _MM_HINT_T0);
      if (DEEP == 2) _mm_prefetch(reinterpret_cast<const char*>(other + ahead) + line, _MM_HINT_T0);
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

// Panels of columns that M rows have registers for.
constexpr int columns_beside(int rows) {
  int n = 1;
  while (2 * n * rows <= SUMS && n < 8) n *= 2;
  return n;
}

// The same for any number of columns, from the widest on. Rows of c have room for whole panels.
template <int M, int N, class S>
void combine_columns(const Factor* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth, int64_t columns, bool down,
                     float* c, int64_t c_stride) {
  const int64_t ahead = down ? 4096 / sizeof(S) : N * PANEL;  // what is read next: further rows, or the next columns
  int64_t i = 0;
  for (; i + N * PANEL <= columns; i += N * PANEL) {
    combine_panels<M, N>(a, a_stride, b + i, b_stride, depth, PANEL, ahead, c + i, c_stride);
  }
  if constexpr (N > 1) {
    combine_columns<M, N / 2>(a, a_stride, b + i, b_stride, depth, columns - i, down, c + i, c_stride);
  } else if (i < columns) {
    combine_panels<M, 1>(a, a_stride, b + i, b_stride, depth, columns - i, ahead, c + i, c_stride);
  }
}

// The same for one row of a over rows of b that are long: eight of them at a time, each from its beginning to its end.
template <class S>
void combine_along(const Factor* a, const S* b, int64_t b_stride, int64_t depth, int64_t columns, float* c) {
  for (int64_t k = 0; k < depth; k += 8, a += 8, b += 8 * b_stride) {
    const int64_t some = std::min<int64_t>(8, depth - k);
    for (int64_t i = 0; i < columns; i += PANEL) {
      const int64_t have = std::min(PANEL, columns - i);
      Floats sum = k ? load(c + i) : splat(0);
      for (int64_t j = 0; j < some; j += DEEP) dot(sum, deep(b + j * b_stride + i, b + (j + 1) * b_stride + i, have), a + j);
      store(c + i, sum);
    }
  }
}

template <class S, int M = ROWS>
void combine(int64_t rows, const Factor* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth, int64_t columns,
             bool down, float* c, int64_t c_stride) {
  if (rows == 1 && !down) return combine_along(a, b, b_stride, depth, columns, c);
  if (rows == M) return combine_columns<M, columns_beside(M)>(a, a_stride, b, b_stride, depth, columns, down, c, c_stride);
  if constexpr (M > 1) combine<S, M - 1>(rows, a, a_stride, b, b_stride, depth, columns, down, c, c_stride);
}

// Keys [d][capacity] and values [capacity][width] of a head, of which the first d count; in bfloat16, or in 8 bits with a scale
// in float16 for each token. Both products are of bfloat16 with sums in float32, in the order of the keys, so that what a query
// sees is the same to the last bit beside any others.
template <class S>
struct Head {
  S *keys, *values;
  uint16_t *key_scales, *value_scales;  // of all heads
  int64_t first_scale, d, capacity, width;
  static constexpr bool SCALED = sizeof(S) == 1;
  static constexpr int64_t SOON = 8;  // tokens

  // Puts keys and values of some tokens, so far from each other, to their places from the first on.
  void keep(int64_t place, int64_t count, const uint16_t* key, const uint16_t* value, int64_t stride) const {
    for (int64_t last = place + count; place < last; place++, key += stride, value += stride) {
      for (int64_t i = 0; i < d; i += 32) {  // rows are far from each other, so no others tell of them
        _mm_prefetch(reinterpret_cast<const char*>(key + SOON * stride + i), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(value + SOON * stride + i), _MM_HINT_T0);
      }
      if constexpr (SCALED) {
        const float by_key = scale(key, &key_scales[first_scale + place]);
        const float by_value = scale(value, &value_scales[first_scale + place]);
        for (int64_t i = 0; i < d; i++) keys[i * capacity + place] = rounded(to_float(key[i]), by_key);
        for (int64_t i = 0; i < d; i++) values[place * width + i] = rounded(to_float(value[i]), by_value);
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
    return half(*to);
  }

  static int8_t rounded(float x, float scale) {
    return scale == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x / scale))));
  }

  // What up to ROWS queries [rows][d] see, each of the first `lengths` tokens -> out [rows][width]; scores: room for
  // whole(longest) a row.
  void see(int64_t rows, const Factor* q, const int64_t* lengths, float* scores, float* out) const {
    const int64_t longest = *std::max_element(lengths, lengths + rows), room = whole(longest);
    const auto shares = reinterpret_cast<Factor*>(scores);
    float factors[ROWS];
    combine(rows, q, d, keys, capacity, d, longest, false, scores, room);
    for (int64_t m = 0; m < rows; m++) factors[m] = 1 / share(scores + m * room, lengths[m], room);
    combine(rows, shares, room * sizeof(float) / sizeof(Factor), values, width, longest, width, true, out, width);
    for (int64_t m = 0; m < rows; m++) {
      for (float* x = out + m * width; x < out + (m + 1) * width; x += PANEL) store(x, mul(load(x), splat(factors[m])));
    }
  }

  // Scores become e ** ((score - the largest) / sqrt(d)), as factors in the same place, noughts beyond the length; -> their sum.
  float share(float* scores, int64_t length, int64_t room) const {
    if constexpr (SCALED) {
      for (int64_t t = 0; t < length; t += PANEL) store(scores + t, mul(load(scores + t), scales(key_scales, t, length)));
    }
    for (int64_t t = length; t < whole(length); t++) scores[t] = -std::numeric_limits<float>::infinity();
    const Floats root = splat(1 / std::sqrt(float(d)));
    Floats largest = load(scores), sum = splat(0);
    for (int64_t t = PANEL; t < length; t += PANEL) largest = most(largest, load(scores + t));
    float parts[PANEL], total = 0;
    store(parts, largest);
    const Floats below = splat(-*std::max_element(parts, parts + PANEL));
    const auto shares = reinterpret_cast<Factor*>(scores);
    for (int64_t t = 0; t < length; t += PANEL) {
      Floats p = exponential(mul(plus(load(scores + t), below), root));
      sum = plus(sum, p);
      if constexpr (SCALED) p = mul(p, scales(value_scales, t, length));
      store_factors(shares + t, p);
    }
    std::memset(shares + length, 0, (room - length) * sizeof(Factor));
    store(parts, sum);
    for (float part : parts) total += part;
    return total;
  }

  Floats scales(const uint16_t* from, int64_t t, int64_t length) const {
    from += first_scale + t;
    if (t + PANEL <= length) return halves(from);
    uint16_t some[PANEL] = {};
    std::memcpy(some, from, (length - t) * sizeof(uint16_t));
    return halves(some);
  }
};

// Room for what a tile of queries needs.
struct Scratch {
  Array<float> scores, out;
  Array<Factor> q;
  Scratch(int64_t longest, int64_t d, int64_t width)
      : scores(array<float>(ROWS * whole(longest))), out(array<float>(ROWS * width)), q(array<Factor>(ROWS * d)) {}
};

// Room that a thread needs for a layer: a token's row, and groups of inputs, of which there are at most so many.
struct Room {
  Scratch attention;
  Array<float> row;
  Unpacked unpacked;
  Room(Scratch attention, int64_t width, int64_t groups)
      : attention(std::move(attention)), row(array<float>(width)), unpacked(groups) {}
};

// Queries of some tokens of a sequence, those of `group` heads beside each other; all see the same head of keys and values, the
// first `seen` tokens, and one more for each token that is later than the first, if they are new.
struct Queries {
  const uint16_t* q;  // of the first token
  int64_t tokens, stride, group, seen;
  bool each_one_more;

  int64_t tiles() const { return (tokens * group + ROWS - 1) / ROWS; }
  // put(token, which head of the group, what it sees) for a tile of them.
  template <class S, class F>
  void see(int64_t tile, const Head<S>& head, Scratch& scratch, F&& put) const {
    const int64_t first = tile * tokens * group / tiles(), rows = (tile + 1) * tokens * group / tiles() - first;
    int64_t lengths[ROWS];
    for (int64_t m = 0; m < rows; m++) {
      const int64_t token = (first + m) / group, h = (first + m) % group;
      const uint16_t* from = q + token * stride + h * head.d;
      for (int64_t i = 0; i < head.d; i++) factor(&scratch.q[m * head.d + i], from[i]);
      lengths[m] = seen + (each_one_more ? token : 0);
    }
    head.see(rows, scratch.q.get(), lengths, scratch.scores.get(), scratch.out.get());
    for (int64_t m = 0; m < rows; m++) put((first + m) / group, (first + m) % group, &scratch.out[m * head.width]);
  }
};

// Attention of new tokens of a sequence.
template <class S>
struct Attention {
  const uint16_t *q, *k, *v;  // [tokens][heads][d] and twice [tokens][kv heads][d]
  S *keys, *values;           // [kv heads][d][capacity], [kv heads][capacity][d]
  uint16_t *key_scales, *value_scales;  // [kv heads][capacity], float16; with 8 bits
  uint16_t* out;
  int64_t tokens, heads, kv_heads, d, capacity, at;

  static void some(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Attention*>(context);
    Scratch scratch(self.at + self.tokens, self.d, self.d);
    for (int64_t head = begin; head < end; head++) self.one(head, scratch);
  }

  void one(int64_t number, Scratch& scratch) const {
    const int64_t group = heads / kv_heads, part = number * capacity;
    const Head<S> head{keys + part * d, values + part * d, key_scales, value_scales, part, d, capacity, d};
    head.keep(at, tokens, k + number * d, v + number * d, kv_heads * d);
    const Queries queries{q + number * group * d, tokens, heads * d, group, at + 1, true};
    for (int64_t tile = 0; tile < queries.tiles(); tile++) {
      queries.see(tile, head, scratch, [&](int64_t token, int64_t h, const float* x) {
        uint16_t* to = out + (token * heads + number * group + h) * d;
        for (int64_t i = 0; i < d; i += PANEL) store(to + i, load(x + i));
      });
    }
  }
};

template <class S>
void attend(ParallelFor parallel_for, const uint16_t* q, const uint16_t* k, const uint16_t* v, void* keys, void* values,
            uint16_t* key_scales, uint16_t* value_scales, uint16_t* out, int64_t tokens, int64_t heads, int64_t kv_heads,
            int64_t d, int64_t capacity, int64_t at) {
  Attention<S> self{q, k, v, static_cast<S*>(keys), static_cast<S*>(values), key_scales, value_scales, out, tokens, heads,
                    kv_heads, d, capacity, at};
  const int64_t work = 2 * tokens * heads / kv_heads * d * (at + tokens);
  parallel_for(0, kv_heads, std::max<int64_t>(1, SERIAL / 4 / work), Attention<S>::some, &self);
}

// The threads that compute one call together. They share each piece of work, and whoever is early waits for the others.
class Team {
 public:
  Team(int64_t size, int64_t pieces) : size(size), begun(new std::atomic<int64_t>[pieces]) {
    for (int64_t i = 0; i < pieces; i++) begun[i] = 0;
  }

  // A thread, or what stands for several where PyTorch has fewer to lend than were asked for.
  class Member {
   public:
    Member(Team& team, int64_t weight) : team(team), weight(weight) {}

    // Calls task(i) once for each i below `count` in any of the threads, some neighbours at a time, fewer towards the end so
    // that nobody waits for long; returns when all are done.
    template <class F>
    void each(int64_t count, F&& task) {
      std::atomic<int64_t>& begun = team.begun[piece++];
      for (int64_t i = begun; i < count; i = begun) {
        const int64_t end = i + std::max<int64_t>(1, (count - i) / (2 * team.size));
        if (begun.compare_exchange_weak(i, end)) {
          for (; i < end; i++) task(i);
        }
      }
      team.arrived += weight;
      for (int64_t turn = 0; team.arrived < team.size * piece; turn++) turn < PATIENCE ? _mm_pause() : void(sched_yield());
    }

   private:
    static constexpr int64_t PATIENCE = 10000;  // turns, some hundred microseconds: then the other has lost its processor
    Team& team;
    const int64_t weight;
    int64_t piece = 0;
  };

 private:
  const int64_t size;
  std::unique_ptr<std::atomic<int64_t>[]> begun;  // by piece of work, how much
  std::atomic<int64_t> arrived{0};
};

struct LayerWeights {  // as the caller lays them out, in words of 64 bits, like all below
  const uint16_t *before_attention, *before_mlp;
  Weight q, k, v, o, gate, up, down;
};
struct Memory {  // of a sequence, in a layer
  void *keys, *values;
  uint16_t *key_scales, *value_scales;
};
struct Sequence {
  int64_t first, count, at, capacity;  // its rows among the tokens, and their place in its memory
  int64_t asked;                       // the last so many of them are wanted in the end
  const Memory* memory;                // by layer
};
struct Shape {
  int64_t layers, width, inner, heads, kv_heads, d;
};
struct TowerWeights {
  const uint16_t *norm, *norm_bias, *mlp_norm, *mlp_norm_bias;
  Weight q, k, v, o, fc1, fc2;
};

// Hidden states in float32 from the first layer to the last, and what is done to them in a decoder as in a tower.
struct Hidden {
  int64_t tokens;
  const int64_t width;
  Array<float> x;  // [tokens][width]
  Inputs normed;

  Hidden(int64_t tokens, int64_t width, const uint16_t* hidden)
      : tokens(tokens), width(width), x(array<float>(tokens * width)), normed(tokens, groups_of(width)) {
    for (int64_t i = 0; i < tokens * width; i += PANEL) store(&x[i], load(hidden + i));
  }
  void write(uint16_t* hidden) const {
    for (int64_t i = 0; i < tokens * width; i += PANEL) store(hidden + i, load(&x[i]));
  }

  // (x - mean) / its root mean square * weight + bias; without a bias nothing is taken off.
  void norm(int64_t token, const uint16_t* weight, const uint16_t* bias, float eps, Room& room) {
    const float* row = &x[token * width];
    const Floats mean = splat(bias ? -total(row, [](Floats y) { return y; }) / width : 0);
    const float squares = total(row, [&](Floats y) { return mul(plus(y, mean), plus(y, mean)); });
    const Floats factor = splat(1 / std::sqrt(squares / width + eps));
    for (int64_t i = 0; i < width; i += PANEL) {
      const Floats y = mul(mul(plus(load(row + i), mean), factor), load(weight + i));
      store(&room.row[i], bias ? plus(y, load(bias + i)) : y);
    }
    normed.put(token, room.row.get(), width);
  }
  template <class F>
  float total(const float* row, F&& of) const {
    Floats sum = splat(0);
    for (int64_t i = 0; i < width; i += PANEL) sum = plus(of(load(row + i)), sum);
    float parts[PANEL], all = 0;
    store(parts, sum);
    for (float part : parts) all += part;
    return all;
  }

  // put(token, the panel's 16 outputs) for the tokens of some tiles.
  template <class F>
  static void multiply(const Weight& w, int64_t number, const Inputs& inputs, Tiles tiles, Room& room, F&& put) {
    const Floats bias = w.bias ? load(w.bias + number * PANEL) : splat(0);
    const Panel panel = room.unpacked.panel(w, number, inputs, tiles);
    float rows[TILE * PANEL];
    for (int64_t tile = tiles.first; tile < tiles.last; tile++) {
      product(panel, inputs, tile, rows);
      for (int64_t m = 0; m < inputs.size(tile); m++) put(inputs.first(tile) + m, plus(load(rows + m * PANEL), bias));
    }
  }

  // put(token, outputs of the one, outputs of the other), of two panels.
  template <class F>
  static void multiply(const Weight& a, int64_t i, const Weight& b, int64_t j, const Inputs& inputs, Tiles tiles, Room& room, F&& put) {
    const Floats a_bias = a.bias ? load(a.bias + i * PANEL) : splat(0), b_bias = b.bias ? load(b.bias + j * PANEL) : splat(0);
    const Panel one = room.unpacked.panel(a, i, inputs, tiles), other = room.unpacked.panel(b, j, inputs, tiles, 1);
    float ones[TILE * PANEL], others[TILE * PANEL];
    for (int64_t tile = tiles.first; tile < tiles.last; tile++) {
      product(one, inputs, tile, ones);
      product(other, inputs, tile, others);
      for (int64_t m = 0; m < inputs.size(tile); m++) {
        put(inputs.first(tile) + m, plus(load(ones + m * PANEL), a_bias), plus(load(others + m * PANEL), b_bias));
      }
    }
  }

  // task(panel, tiles) for all of them.
  template <class F>
  static void each(Team::Member& team, const Inputs& inputs, int64_t panels, F&& task) {
    team.each(inputs.blocks() * panels, [&](int64_t number) { task(number % panels, inputs.block(number / panels)); });
  }

  // x += the product, of all tokens.
  void add(Team::Member& team, const Weight& w, const Inputs& inputs, Room& room) {
    each(team, inputs, width / PANEL, [&](int64_t panel, Tiles tiles) {
      multiply(w, panel, inputs, tiles, room, [&](int64_t token, Floats y) {
        float* to = &x[token * width + panel * PANEL];
        store(to, plus(y, load(to)));
      });
    });
  }
};

// The layers of a Qwen2 decoder for new tokens of some sequences. Queries, keys, values and shares are bfloat16, everything else
// is float32 from the first layer to the last.
struct Decoder : Shape {
  const LayerWeights* weights;
  int64_t tokens;
  const float eps;
  std::vector<Sequence> sequences;
  const uint16_t *cosines, *sines;  // [tokens][d]
  std::vector<int64_t> tasks;       // of attention, up to each sequence
  int64_t longest = 0, asked = 0;
  Team team;
  Hidden hidden;
  Inputs attended, gated;
  Array<uint16_t> projected;   // [tokens][heads of q, k and v][d], turned
  Array<float> seen, made;  // [tokens][heads][d], [tokens][inner]; what becomes attended, gated

  Decoder(const Shape& shape, int64_t threads, const LayerWeights* weights, int64_t tokens, float eps, const Sequence* sequences,
          int64_t sequence_count, const uint16_t* cosines, const uint16_t* sines, const uint16_t* x)
      : Shape(shape), weights(weights), tokens(tokens), eps(eps), sequences(sequences, sequences + sequence_count), cosines(cosines),
        sines(sines), team(threads, 10 * layers + 1), hidden(tokens, width, x), attended(tokens, groups_of(heads * d)),
        gated(tokens, groups_of(inner)), projected(array<uint16_t>(tokens * stride())),
        seen(array<float>(tokens * heads * d)), made(array<float>(tokens * inner)) {
    for (const Sequence& s : this->sequences) {
      longest = std::max(longest, s.at + s.count);
      asked += s.asked;
    }
    divide();
  }

  void divide() {
    tasks.assign(1, 0);
    for (const Sequence& s : sequences) tasks.push_back(tasks.back() + kv_heads * queries(s, 0).tiles());
  }

  // Leaves the rows that are asked for, one after another; the others have given the last layer their keys and values, all that
  // anybody needs of them there.
  void narrow() {
    tokens = 0;
    for (Sequence& s : sequences) {
      const int64_t from = s.first + s.count - s.asked;
      std::memmove(&hidden.x[tokens * width], &hidden.x[from * width], s.asked * width * sizeof(float));
      std::memmove(&projected[tokens * stride()], &projected[from * stride()], s.asked * stride() * sizeof(uint16_t));
      s = {tokens, s.asked, s.at + s.count - s.asked, s.capacity, s.asked, s.memory};
      tokens += s.asked;
    }
    hidden.tokens = tokens;
    for (Inputs* inputs : {&hidden.normed, &attended, &gated}) inputs->hold(tokens);
    divide();
  }

  static void some(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Decoder*>(context);
    Team::Member member(self.team, end - begin);
    const int64_t groups = std::max({self.hidden.normed.groups, self.attended.groups, self.gated.groups});
    Room room(Scratch(self.longest, self.d, self.d), self.width, groups);
    const bool narrows = self.asked < self.tokens;
    for (int64_t layer = 0; layer < self.layers; layer++) self.one(member, layer, narrows && layer + 1 == self.layers, room);
  }

  void one(Team::Member& team, int64_t layer, bool narrows, Room& room) {
    const LayerWeights& w = weights[layer];
    const Inputs& normed = hidden.normed;
    team.each(tokens, [&](int64_t token) { hidden.norm(token, w.before_attention, nullptr, eps, room); });
    Hidden::each(team, normed, (heads + 2 * kv_heads) * d / PANEL / 2, [&](int64_t number, Tiles tiles) { project(w, number, tiles, room); });
    team.each(sequences.size() * kv_heads, [&](int64_t task) {
      const Sequence& s = sequences[task / kv_heads];
      s.memory[layer].key_scales ? keep<int8_t>(s, layer, task % kv_heads) : keep<uint16_t>(s, layer, task % kv_heads);
    });
    if (narrows) team.each(1, [&](int64_t) { narrow(); });
    team.each(tasks.back(), [&](int64_t task) {
      const int64_t i = std::upper_bound(tasks.begin(), tasks.end(), task) - tasks.begin() - 1;
      const bool scaled = sequences[i].memory[layer].key_scales;
      const int64_t part = task - tasks[i];
      scaled ? attend<int8_t>(i, layer, part, room.attention) : attend<uint16_t>(i, layer, part, room.attention);
    });
    team.each(tokens, [&](int64_t token) { attended.put(token, &seen[token * heads * d], heads * d); });
    hidden.add(team, w.o, attended, room);
    team.each(tokens, [&](int64_t token) { hidden.norm(token, w.before_mlp, nullptr, eps, room); });
    Hidden::each(team, normed, inner / PANEL, [&](int64_t panel, Tiles tiles) { gate(w, panel, tiles, room); });
    team.each(tokens, [&](int64_t token) { gated.put(token, &made[token * inner], inner); });
    hidden.add(team, w.down, gated, room);
  }

  template <class S>
  Head<S> head(const Sequence& s, int64_t layer, int64_t number) const {
    const Memory& m = s.memory[layer];
    const int64_t part = number * s.capacity;
    return {static_cast<S*>(m.keys) + part * d, static_cast<S*>(m.values) + part * d, m.key_scales, m.value_scales, part, d,
            s.capacity, d};
  }

  int64_t stride() const { return (heads + 2 * kv_heads) * d; }

  // Queries, keys and values, of a panel in the first half of a head and of the one that lies as far in the second: in queries and
  // keys the two are turned against each other as a token's place asks.
  void project(const LayerWeights& w, int64_t number, Tiles tiles, Room& room) {
    const int64_t half = d / PANEL / 2, head = number / half, at = number % half * PANEL;
    const Weight& part = head < heads ? w.q : head < heads + kv_heads ? w.k : w.v;
    const int64_t first = head < heads ? 0 : head < heads + kv_heads ? heads : heads + kv_heads;
    const int64_t panel = (head - first) * 2 * half + number % half;
    const bool turned = head < heads + kv_heads;
    Hidden::multiply(part, panel, part, panel + half, hidden.normed, tiles, room, [&](int64_t token, Floats a, Floats b) {
      uint16_t* to = &projected[token * stride() + head * d + at];
      const uint16_t *cosine = cosines + token * d + at, *sine = sines + token * d + at;
      store(to, turned ? fma(a, load(cosine), mul(mul(b, splat(-1)), load(sine))) : a);
      store(to + d / 2, turned ? fma(b, load(cosine + d / 2), mul(a, load(sine + d / 2))) : b);
    });
  }

  template <class S>
  void keep(const Sequence& s, int64_t layer, int64_t number) {
    const uint16_t* key = &projected[s.first * stride() + (heads + number) * d];
    head<S>(s, layer, number).keep(s.at, s.count, key, key + kv_heads * d, stride());
  }

  Queries queries(const Sequence& s, int64_t number) const {
    const int64_t group = heads / kv_heads;
    return {&projected[s.first * stride() + number * group * d], s.count, stride(), group, s.at + 1, true};
  }

  template <class S>
  void attend(int64_t i, int64_t layer, int64_t task, Scratch& scratch) {
    const Sequence& s = sequences[i];
    const int64_t tiles = (tasks[i + 1] - tasks[i]) / kv_heads, number = task / tiles, group = heads / kv_heads;
    queries(s, number).see(task % tiles, head<S>(s, layer, number), scratch, [&](int64_t token, int64_t h, const float* x) {
      std::memcpy(&seen[((s.first + token) * heads + number * group + h) * d], x, d * sizeof(float));
    });
  }

  // silu(gate) * up
  void gate(const LayerWeights& w, int64_t number, Tiles tiles, Room& room) {
    Hidden::multiply(w.gate, number, w.up, number, hidden.normed, tiles, room, [&](int64_t token, Floats gate, Floats up) {
      store(&made[token * inner + number * PANEL], mul(mul(gate, sigmoid(gate)), up));
    });
  }
};

// The layers of a SigLIP tower for one crop, all of whose tokens see each other; numbers are of the same types.
struct Tower : Shape {
  const TowerWeights* weights;
  const int64_t tokens, places, padded;  // tokens, and a head's width, filled up to whole panels
  const float eps;
  Team team;
  Hidden hidden;
  Inputs attended, gated;
  Array<uint16_t> projected, keys, values;  // [3][tokens][width], [heads][d][places], [heads][tokens][padded]
  Array<float> seen, made;                  // [tokens][width], [tokens][inner]; what becomes attended, gated

  Tower(const Shape& shape, int64_t threads, const TowerWeights* weights, int64_t tokens, float eps, const uint16_t* x)
      : Shape(shape), weights(weights), tokens(tokens), places(whole(tokens)), padded(whole(d)), eps(eps), team(threads, 10 * layers),
        hidden(tokens, width, x), attended(tokens, groups_of(width)), gated(tokens, groups_of(inner)),
        projected(array<uint16_t>(3 * tokens * width)), keys(array<uint16_t>(heads * d * places)),
        values(array<uint16_t>(heads * tokens * padded)), seen(array<float>(tokens * width)), made(array<float>(tokens * inner)) {}

  static void some(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Tower*>(context);
    Team::Member member(self.team, end - begin);
    Room room(Scratch(self.tokens, self.d, self.padded), self.width, std::max(self.attended.groups, self.gated.groups));
    for (int64_t layer = 0; layer < self.layers; layer++) self.one(member, self.weights[layer], room);
  }

  void one(Team::Member& team, const TowerWeights& w, Room& room) {
    const Inputs& normed = hidden.normed;
    const int64_t panels = width / PANEL;
    team.each(tokens, [&](int64_t token) { hidden.norm(token, w.norm, w.norm_bias, eps, room); });
    Hidden::each(team, normed, 3 * panels, [&](int64_t panel, Tiles tiles) {
      const Weight& part = panel < panels ? w.q : panel < 2 * panels ? w.k : w.v;
      uint16_t* to = &projected[panel / panels * tokens * width + panel % panels * PANEL];
      Hidden::multiply(part, panel % panels, normed, tiles, room, [&](int64_t token, Floats y) { store(to + token * width, y); });
    });
    team.each(heads, [&](int64_t number) {
      const uint16_t *k = &projected[tokens * width + number * d], *v = k + tokens * width;
      head(number).keep(0, tokens, k, v, width);
    });
    const int64_t tiles = queries(0).tiles();
    team.each(heads * tiles, [&](int64_t task) {
      const int64_t number = task / tiles;
      queries(number).see(task % tiles, head(number), room.attention, [&](int64_t token, int64_t, const float* x) {
        std::memcpy(&seen[token * width + number * d], x, d * sizeof(float));
      });
    });
    team.each(tokens, [&](int64_t token) { attended.put(token, &seen[token * width], width); });
    hidden.add(team, w.o, attended, room);
    team.each(tokens, [&](int64_t token) { hidden.norm(token, w.mlp_norm, w.mlp_norm_bias, eps, room); });
    Hidden::each(team, normed, inner / PANEL, [&](int64_t panel, Tiles tiles) {  // gelu by tanh
      Hidden::multiply(w.fc1, panel, normed, tiles, room, [&](int64_t token, Floats x) {  // x * (1 + tanh(y)) / 2 is x / (1 + e ** -2y)
        const Floats y = mul(fma(mul(x, x), splat(0.044715f), splat(1)), mul(x, splat(1.5957691216f)));  // 2 sqrt(2 / pi)
        store(&made[token * inner + panel * PANEL], mul(x, sigmoid(y)));
      });
    });
    team.each(tokens, [&](int64_t token) { gated.put(token, &made[token * inner], inner); });
    hidden.add(team, w.fc2, gated, room);
  }

  Head<uint16_t> head(int64_t number) const {
    return {&keys[number * d * places], &values[number * tokens * padded], nullptr, nullptr, 0, d, places, padded};
  }
  Queries queries(int64_t number) const { return {&projected[number * d], tokens, width, 1, tokens, false}; }
};

}  // namespace

// y [tokens, out] = x [tokens, in] by the packed weight, plus the bias where there is one; x, bias and y are float32 or bfloat16.
extern "C" void llava_linear(ParallelFor parallel_for, int32_t bits, int32_t bfloat16, const void* x, const uint8_t* weight,
                             const uint16_t* scale, const void* bias, void* y, int64_t tokens, int64_t in, int64_t out) {
  (bfloat16 ? linear<uint16_t> : linear<float>)(parallel_for, bits, x, weight, scale, bias, y, tokens, in, out);
}

// Puts k and v of some tokens to the places from `at` on of a sequence's memory; out = what each q sees of the tokens up to its
// own. d is a multiple of 16. Without scales the memory is bfloat16, with them it has 8 bits.
extern "C" void llava_attend(ParallelFor parallel_for, const uint16_t* q, const uint16_t* k, const uint16_t* v, void* keys,
                             void* values, uint16_t* key_scales, uint16_t* value_scales, uint16_t* out, int64_t tokens,
                             int64_t heads, int64_t kv_heads, int64_t d, int64_t capacity, int64_t at) {
  (key_scales ? attend<int8_t> : attend<uint16_t>)(parallel_for, q, k, v, keys, values, key_scales, value_scales, out, tokens,
                                                   heads, kv_heads, d, capacity, at);
}

// What a decoder's layers make of the hidden states [tokens, width], in place, bfloat16; the rows asked for come to lie at the
// beginning. Biases are there for q, k and v alone; width and inner are multiples of 16, d of 32.
extern "C" void llava_decode(ParallelFor parallel_for, int64_t threads, const Shape* shape, const LayerWeights* weights,
                             float eps, const Sequence* sequences, int64_t sequence_count, const uint16_t* cosines, const uint16_t* sines,
                             uint16_t* hidden, int64_t tokens) {
  Decoder self(*shape, threads, weights, tokens, eps, sequences, sequence_count, cosines, sines, hidden);
  parallel_for(0, threads, 1, Decoder::some, &self);
  self.hidden.write(hidden);
}

// What a tower's layers make of the hidden states [tokens, width] of a crop, in place, bfloat16. There are as many heads of keys
// as of queries; width and inner are multiples of 16, d of 2.
extern "C" void llava_encode(ParallelFor parallel_for, int64_t threads, const Shape* shape, const TowerWeights* weights,
                             float eps, uint16_t* hidden, int64_t tokens) {
  Tower self(*shape, threads, weights, tokens, eps, hidden);
  parallel_for(0, threads, 1, Tower::some, &self);
  self.hidden.write(hidden);
}
