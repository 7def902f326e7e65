// Vectors of sixteen lanes for x86 with AVX-512 VNNI (and BF16), AVX-VNNI or AVX2.

#pragma once

#include <immintrin.h>

#include "simd.h"

namespace {

// Sixteen lanes, one per output of a panel.
#if defined(__AVX512VNNI__)
constexpr int ZERO = 128;         // products take q + ZERO
constexpr int ACCUMULATORS = 24;  // of attention, in registers
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
inline Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline Bytes splat8(int8_t n) { return _mm512_set1_epi8(n); }
inline Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, splat8(15)); }
inline Bytes high_nibbles(Bytes b) { return low_nibbles(_mm512_srli_epi16(b, 4)); }
inline Bytes even_bytes(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi16(255)); }
inline Bytes broadcast_byte(Bytes fours, int i) {  // byte i of each four, four times
  return _mm512_shuffle_epi8(
      fours, _mm512_add_epi8(splat8(i), _mm512_broadcast_i32x4(_mm_setr_epi32(
                                            0, 0x04040404, 0x08080808, 0x0c0c0c0c))));
}
inline Bytes mul16(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, b); }  // 16-bit lanes
inline Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes sub8(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
inline Ints splat32(int32_t n) { return _mm512_set1_epi32(n); }
inline Ints add32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline void dot(Ints& sum, Bytes w,
                const int8_t* quad) {  // the compiler would copy the sums and broadcast separately
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const Word*>(quad)));
}
inline void dot_positive(Ints& sum, Bytes b, const int8_t* quad) {
  sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(*reinterpret_cast<const Word*>(quad)), b);
}
inline Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Ints n) { _mm512_storeu_si512(p, n); }
inline void store(int8_t* p, Ints n) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(n));
}
// The upper and the lower 7 bits of 64 numbers.
inline void store_planes(int8_t* high, int8_t* low, const Ints (&n)[4]) {
  const __m512i a = _mm512_packs_epi32(n[0], n[1]), b = _mm512_packs_epi32(n[2], n[3]),
                mask = _mm512_set1_epi16(127),
                order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto save = [&](int8_t* p, __m512i x, __m512i y) {
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(x, y)));
  };
  save(high, _mm512_srli_epi16(a, 7), _mm512_srli_epi16(b, 7));
  save(low, _mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
}
constexpr int WIDE = 4;  // panels that `interleave` makes at once
inline void restore_order(__m512i (&x)[WIDE]) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44),
                b = _mm512_shuffle_i32x4(x[2], x[3], 0x44),
                c = _mm512_shuffle_i32x4(x[0], x[1], 0xee),
                d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88), x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88), x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}
// Four rows of WIDE panels as columns of four, each + zero. In order after `restore_order`, which
// does the same to sums of products with them.
inline void interleave(const int8_t* row, int64_t stride, int8_t zero, Bytes (&out)[WIDE]) {
  const auto bytes = [&](int i) { return add(_mm512_loadu_si512(row + i * stride), splat8(zero)); };
  const __m512i a = bytes(0), b = bytes(1), c = bytes(2), d = bytes(3);
  const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b),
                other_low = _mm512_unpacklo_epi8(c, d), other_high = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(low, other_low), out[1] = _mm512_unpackhi_epi16(low, other_low);
  out[2] = _mm512_unpacklo_epi16(high, other_high),
  out[3] = _mm512_unpackhi_epi16(high, other_high);
}
inline Ints join_planes(Ints high, Ints low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
}
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints n) { return _mm512_cvtepi32_ps(n); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats widen_bfloat16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}  // bfloat16
inline Floats load(const uint16_t* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats select_by_sign(Floats x, Floats positive, Floats negative) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), positive, negative);
}
inline Floats round_even(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats mul_pow2(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x * 2 ** n
inline Floats fraction(Floats x) {  // _mm512_reduce_ps rounds down what is close to 1
  return _mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
inline Floats mul_pow2_floor(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats load_masked(const uint16_t* p, int64_t have) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16((1u << have) - 1, p));
}
inline __m256i to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(
      nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
#endif
}
#else
#if defined(__AVXVNNI__)
constexpr int ZERO = 128;
#else
constexpr int ZERO = 0;
#endif
constexpr int ACCUMULATORS = 6;
struct Bytes {
  __m256i a, b;
};
struct Ints {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Bytes bytes(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline void store(uint8_t* p, Bytes b) { store256(p, b.a), store256(p + 32, b.b); }
inline Bytes splat8(int8_t n) { return {_mm256_set1_epi8(n), _mm256_set1_epi8(n)}; }
inline Bytes low_nibbles(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(b.a, mask), _mm256_and_si256(b.b, mask)};
}
inline Bytes high_nibbles(Bytes b) {
  return low_nibbles({_mm256_srli_epi16(b.a, 4), _mm256_srli_epi16(b.b, 4)});
}
inline Bytes even_bytes(Bytes b) {
  const __m256i mask = _mm256_set1_epi16(255);
  return {_mm256_and_si256(b.a, mask), _mm256_and_si256(b.b, mask)};
}
inline Bytes broadcast_byte(Bytes fours, int i) {  // byte i of each four, four times
  const __m256i first = _mm256_broadcastsi128_si256(
                    _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)),
                order = _mm256_add_epi8(_mm256_set1_epi8(int8_t(i)), first);
  return {_mm256_shuffle_epi8(fours.a, order), _mm256_shuffle_epi8(fours.b, order)};
}
inline Bytes mul16(Bytes a, Bytes b) {  // 16-bit lanes
  return {_mm256_mullo_epi16(a.a, b.a), _mm256_mullo_epi16(a.b, b.b)};
}
inline Bytes add(Bytes a, Bytes b) {
  return {_mm256_add_epi8(a.a, b.a), _mm256_add_epi8(a.b, b.b)};
}
inline Bytes sub8(Bytes a, Bytes b) {
  return {_mm256_sub_epi8(a.a, b.a), _mm256_sub_epi8(a.b, b.b)};
}
inline Ints splat32(int32_t n) { return {_mm256_set1_epi32(n), _mm256_set1_epi32(n)}; }
inline Ints add32(Ints a, Ints b) {
  return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)};
}
inline Ints load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
inline void store(int32_t* p, Ints n) { store256(p, n.a), store256(p + 8, n.b); }
#if defined(__AVXVNNI__)
inline void dot(Ints& sum, Bytes w, const int8_t* quad) {
  const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const Word*>(quad));
  sum.a = _mm256_dpbusd_avx_epi32(sum.a, w.a, x), sum.b = _mm256_dpbusd_avx_epi32(sum.b, w.b, x);
}
inline void dot_positive(Ints& sum, Bytes b, const int8_t* quad) {
  const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const Word*>(quad));
  sum.a = _mm256_dpbusd_avx_epi32(sum.a, x, b.a), sum.b = _mm256_dpbusd_avx_epi32(sum.b, x, b.b);
}
#else
inline __m256i add_pairs(__m256i sum, __m256i products) {  // of 16 bits
  return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
// The sum of two products of unsigned and signed bytes can overflow 16 bits, so signs move to x.
inline void dot(Ints& sum, Bytes w, const int8_t* quad) {
  const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const Word*>(quad));
  sum.a = add_pairs(sum.a, _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)));
  sum.b = add_pairs(sum.b, _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b)));
}
inline void dot_positive(Ints& sum, Bytes b, const int8_t* quad) {
  const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const Word*>(quad));
  sum.a = add_pairs(sum.a, _mm256_maddubs_epi16(x, b.a));
  sum.b = add_pairs(sum.b, _mm256_maddubs_epi16(x, b.b));
}
#endif
inline void store(int8_t* p, Ints n) {
  const auto narrow = [](__m256i x) {
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  };
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(narrow(n.a), narrow(n.b)));
}
// The upper and the lower 7 bits of 64 numbers.
inline void store_planes(int8_t* high, int8_t* low, const Ints (&n)[4]) {
  const __m256i mask = _mm256_set1_epi16(127), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto save = [&](int8_t* p, __m256i x, __m256i y) {
    store256(p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(x, y), order));
  };
  for (int i = 0; i < 4; i += 2) {
    const __m256i a = _mm256_packs_epi32(n[i].a, n[i].b),
                  b = _mm256_packs_epi32(n[i + 1].a, n[i + 1].b);
    save(high + 16 * i, _mm256_srli_epi16(a, 7), _mm256_srli_epi16(b, 7));
    save(low + 16 * i, _mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  }
}
constexpr int WIDE = 2;  // panels that `interleave` makes at once
template <class V>
inline void restore_order(V (&x)[WIDE]) {
  const auto halves = [](__m256i a, __m256i b, auto which) {
    return _mm256_permute2x128_si256(a, b, decltype(which)::value);
  };
  const std::integral_constant<int, 0x20> lower;
  const std::integral_constant<int, 0x31> upper;
  const V a = x[0], b = x[1];
  x[0] = {halves(a.a, a.b, lower), halves(b.a, b.b, lower)};
  x[1] = {halves(a.a, a.b, upper), halves(b.a, b.b, upper)};
}
// Four rows of WIDE panels as columns of four, each + zero. In order after `restore_order`, which
// does the same to sums of products with them.
inline void interleave(const int8_t* row, int64_t stride, int8_t zero, Bytes (&out)[WIDE]) {
  const auto bytes = [&](int i) {
    return _mm256_add_epi8(load256(row + i * stride), _mm256_set1_epi8(zero));
  };
  const __m256i a = bytes(0), b = bytes(1), c = bytes(2), d = bytes(3);
  const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b),
                other_low = _mm256_unpacklo_epi8(c, d), other_high = _mm256_unpackhi_epi8(c, d);
  out[0] = {_mm256_unpacklo_epi16(low, other_low), _mm256_unpackhi_epi16(low, other_low)};
  out[1] = {_mm256_unpacklo_epi16(high, other_high), _mm256_unpackhi_epi16(high, other_high)};
}
inline Ints join_planes(Ints high, Ints low) {
  return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 7), low.a),
          _mm256_add_epi32(_mm256_slli_epi32(high.b, 7), low.b)};
}
inline Floats to_floats(Ints n) { return {_mm256_cvtepi32_ps(n.a), _mm256_cvtepi32_ps(n.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
  auto q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 widen_bfloat16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}  // bfloat16
inline Floats widen_bfloat16(__m256i x) {
  return {widen_bfloat16(_mm256_castsi256_si128(x)),
          widen_bfloat16(_mm256_extracti128_si256(x, 1))};
}
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const uint16_t* p) {
  auto q = reinterpret_cast<const __m128i*>(p);
  return {widen_bfloat16(_mm_loadu_si128(q)), widen_bfloat16(_mm_loadu_si128(q + 1))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
inline Floats maximum(Floats a, Floats b) {
  return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)};
}
inline Floats minimum(Floats a, Floats b) {
  return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)};
}
inline Floats select_by_sign(Floats x, Floats positive, Floats negative) {
  return {_mm256_blendv_ps(positive.a, negative.a, x.a),
          _mm256_blendv_ps(positive.b, negative.b, x.b)};
}
inline __m256 round_even(__m256 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats round_even(Floats x) { return {round_even(x.a), round_even(x.b)}; }
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline __m256 mul_pow2(__m256 x, __m256 n) {  // n is above -127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats mul_pow2(Floats x, Floats n) { return {mul_pow2(x.a, n.a), mul_pow2(x.b, n.b)}; }
inline Floats floor(Floats x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
inline Floats fraction(Floats x) { return add(x, mul(floor(x), splat(-1))); }
inline Floats mul_pow2_floor(Floats x, Floats n) { return mul_pow2(x, floor(n)); }
inline Floats load_masked(const uint16_t* p, int64_t have) {
  uint16_t some[16] = {};
  return load(
      have < 16 ? static_cast<const uint16_t*>(std::memcpy(some, p, have * sizeof(uint16_t))) : p);
}
inline __m256i to_bfloat16(__m256 x) {  // in 32-bit lanes
  const __m256i bits = _mm256_castps_si256(x),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  return _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0),
                            _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256i to_bfloat16(Floats x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bfloat16(x.a), to_bfloat16(x.b)), 0xd8);
}
#endif

inline float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
inline uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void spin_pause() { _mm_pause(); }

inline void store(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x));
}

// Attention multiplies bfloat16 with float32 sums: K_STEP rows of keys or values per instruction.
#if defined(__AVX512BF16__)
constexpr int64_t K_STEP = 2;
using Lhs = uint16_t;     // queries or attention weights, bfloat16
using KVector = __m512i;  // sixteen lanes of two bfloat16 numbers
inline KVector load_k(const uint16_t* first, const uint16_t* second, int64_t have) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __mmask16 there = (1u << have) - 1;
  const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(there, first));
  return _mm512_permutexvar_epi16(
      order, _mm512_inserti64x4(a, _mm256_maskz_loadu_epi16(there, second), 1));
}
inline void dot(Floats& sum, KVector b, const Lhs* a) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)b,
                         (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const Word*>(a)));
}
inline void store_lhs(Lhs* p, Floats x) { store(p, x); }
#else
constexpr int64_t K_STEP = 1;
using Lhs = float;  // rounded to bfloat16
using KVector = Floats;
inline KVector load_k(const uint16_t* row, const uint16_t*, int64_t have) {
  return load_masked(row, have);
}
inline void dot(Floats& sum, KVector b, const Lhs* a) { sum = fma(b, splat(*a), sum); }
inline void store_lhs(Lhs* p, Floats x) { store(p, widen_bfloat16(to_bfloat16(x))); }
#endif

}  // namespace
