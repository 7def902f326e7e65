// Vectors of sixteen lanes for x86 with AVX-512 VNNI (and BF16) or AVX2.

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
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints n) { return _mm512_cvtepi32_ps(n); }
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
inline Floats load_masked(const uint16_t* p, int64_t have) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16((1u << have) - 1, p));
}
inline Floats load_masked(const int8_t* p, int64_t have) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((1u << have) - 1, p)));
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
constexpr int ACCUMULATORS = 6;
struct Floats {
  __m256 a, b;
};
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
inline __m256 mul_pow2(__m256 x, __m256 n) {  // n is above -127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats mul_pow2(Floats x, Floats n) { return {mul_pow2(x.a, n.a), mul_pow2(x.b, n.b)}; }
inline Floats load_masked(const uint16_t* p, int64_t have) {
  uint16_t some[16] = {};
  return load(
      have < 16 ? static_cast<const uint16_t*>(std::memcpy(some, p, have * sizeof(uint16_t))) : p);
}
inline Floats load_masked(const int8_t* p, int64_t have) {
  int8_t some[16] = {};
  if (have < 16) p = static_cast<const int8_t*>(std::memcpy(some, p, have));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
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
inline KVector load_k(
    const int8_t* first, const int8_t* second,
    int64_t have) {  // 8-bit integers are exact in bfloat16: the lower halves are 0
  const __m512i a = _mm512_castps_si512(load_masked(first, have)),
                b = _mm512_castps_si512(load_masked(second, have));
  return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
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
template <class S>
KVector load_k(const S* row, const S*, int64_t have) {
  return load_masked(row, have);
}
inline void dot(Floats& sum, KVector b, const Lhs* a) { sum = fma(b, splat(*a), sum); }
inline void store_lhs(Lhs* p, Floats x) { store(p, widen_bfloat16(to_bfloat16(x))); }
#endif

}  // namespace
