// Vectors of sixteen lanes in plain C++, for every architecture: the reference of the others. It is
// compiled by tests only, since PyTorch's operators are faster.

#pragma once

#include <cmath>

#include "simd.h"

namespace {

constexpr int ACCUMULATORS = 6;  // of attention, in registers
constexpr int ZERO = 0;          // products take q + ZERO

float to_float(uint16_t x);  // bfloat16
void store_scalar(uint16_t* p, float x);

struct Bytes {
  uint8_t v[64];
};
struct Ints {
  int32_t v[16];
};
struct Floats {
  float v[16];
};
// `each` calls f(lane number).
template <class V, class F>
inline V each(F&& f) {
  V made;
  for (size_t i = 0; i < sizeof(made.v) / sizeof(made.v[0]); i++) made.v[i] = f(i);
  return made;
}

inline Bytes bytes(const uint8_t* p) {
  return each<Bytes>([&](size_t i) { return p[i]; });
}
inline void store(uint8_t* p, Bytes b) { std::memcpy(p, b.v, sizeof(b.v)); }
inline Bytes splat8(int8_t n) {
  return each<Bytes>([&](size_t) { return uint8_t(n); });
}
inline Bytes low_nibbles(Bytes b) {
  return each<Bytes>([&](size_t i) { return uint8_t(b.v[i] & 15); });
}
inline Bytes high_nibbles(Bytes b) {
  return each<Bytes>([&](size_t i) { return uint8_t(b.v[i] >> 4); });
}
inline Bytes even_bytes(Bytes b) {
  return each<Bytes>([&](size_t i) { return uint8_t(i % 2 ? 0 : b.v[i]); });
}
inline Bytes broadcast_byte(Bytes fours, int n) {  // byte n of each four, four times
  return each<Bytes>([&](size_t i) { return fours.v[i / 4 * 4 + size_t(n)]; });
}
inline Bytes mul16(Bytes a, Bytes b) {  // 16-bit lanes, low byte first
  return each<Bytes>([&](size_t i) {
    const size_t even = i / 2 * 2;
    const uint32_t product = (a.v[even] + 256u * a.v[even + 1]) * (b.v[even] + 256u * b.v[even + 1]);
    return uint8_t(product >> (i % 2 * 8));
  });
}
inline Bytes add(Bytes a, Bytes b) {
  return each<Bytes>([&](size_t i) { return uint8_t(a.v[i] + b.v[i]); });
}
inline Bytes sub8(Bytes a, Bytes b) {
  return each<Bytes>([&](size_t i) { return uint8_t(a.v[i] - b.v[i]); });
}
inline Ints splat32(int32_t n) {
  return each<Ints>([&](size_t) { return n; });
}
inline Ints add32(Ints a, Ints b) {
  return each<Ints>([&](size_t i) { return a.v[i] + b.v[i]; });
}
inline void dot(Ints& sum, Bytes w, const int8_t* quad) {
  for (size_t i = 0; i < 64; i++) sum.v[i / 4] += int8_t(w.v[i]) * quad[i % 4];
}
inline void dot_positive(Ints& sum, Bytes b, const int8_t* quad) { dot(sum, b, quad); }
inline Ints load(const int32_t* p) {
  return each<Ints>([&](size_t i) { return p[i]; });
}
inline void store(int32_t* p, Ints n) { std::memcpy(p, n.v, sizeof(n.v)); }
inline void store(int8_t* p, Ints n) {
  for (size_t i = 0; i < 16; i++) p[i] = int8_t(n.v[i]);
}
// The upper and the lower 7 bits of 64 numbers.
inline void store_planes(int8_t* high, int8_t* low, const Ints (&n)[4]) {
  for (size_t i = 0; i < 64; i++)
    high[i] = int8_t(n[i / 16].v[i % 16] >> 7), low[i] = int8_t(n[i / 16].v[i % 16] & 127);
}
inline Ints join_planes(Ints high, Ints low) {
  return each<Ints>([&](size_t i) { return high.v[i] * 128 + low.v[i]; });
}
constexpr int WIDE = 1;  // panels that `interleave` makes at once
inline void restore_order(Ints (&)[WIDE]) {}
inline void restore_order(Bytes (&)[WIDE]) {}
// Four rows of WIDE panels as columns of four, each + zero.
inline void interleave(const int8_t* row, int64_t stride, int8_t zero, Bytes (&out)[WIDE]) {
  out[0] = each<Bytes>(
      [&](size_t i) { return uint8_t(row[int64_t(i % 4) * stride + int64_t(i / 4)] + zero); });
}

inline Floats splat(float x) {
  return each<Floats>([&](size_t) { return x; });
}
inline Ints to_ints(Floats x) {
  return each<Ints>([&](size_t i) { return int32_t(std::lrint(x.v[i])); });
}
inline float largest(Floats x) { return *std::max_element(x.v, x.v + 16); }
inline Floats to_floats(Ints n) {
  return each<Floats>([&](size_t i) { return float(n.v[i]); });
}
inline float half_to_float(uint16_t x) {
  const int exponent = x >> 10 & 31, digits = x & 1023;
  float size = exponent ? std::ldexp(float(1024 + digits), exponent - 25)
                        : std::ldexp(float(digits), -24);
  if (exponent == 31) size = digits ? NAN : INFINITY;
  return x >> 15 ? -size : size;
}
inline uint16_t to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 1 << 15 : 0;
  const float size = std::fabs(x);
  if (!(size < 65520)) return uint16_t(sign | (x == x ? 0x7c00 : 0x7e00));
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);  // subnormal numbers below
  const auto digits = uint16_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return uint16_t(sign | (((exponent + 13) << 10) + digits));
}
inline Floats load_half(const uint16_t* p) {
  return each<Floats>([&](size_t i) { return half_to_float(p[i]); });
}
inline Floats load(const float* p) {
  return each<Floats>([&](size_t i) { return p[i]; });
}
inline Floats load(const uint16_t* p) {
  return each<Floats>([&](size_t i) { return to_float(p[i]); });
}
inline Floats load_masked(const uint16_t* p, int64_t have) {
  return each<Floats>([&](size_t i) { return int64_t(i) < have ? to_float(p[i]) : 0.0f; });
}
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline void store(uint16_t* p, Floats x) {
  for (size_t i = 0; i < 16; i++) store_scalar(p + i, x.v[i]);
}
inline Floats add(Floats a, Floats b) {
  return each<Floats>([&](size_t i) { return a.v[i] + b.v[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return each<Floats>([&](size_t i) { return a.v[i] * b.v[i]; });
}
inline Floats div(Floats a, Floats b) {
  return each<Floats>([&](size_t i) { return a.v[i] / b.v[i]; });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return each<Floats>([&](size_t i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Floats maximum(Floats a, Floats b) {
  return each<Floats>([&](size_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats minimum(Floats a, Floats b) {
  return each<Floats>([&](size_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats select_by_sign(Floats x, Floats positive, Floats negative) {
  return each<Floats>(
      [&](size_t i) { return std::signbit(x.v[i]) ? negative.v[i] : positive.v[i]; });
}
inline Floats round_even(Floats x) {
  return each<Floats>([&](size_t i) { return std::nearbyint(x.v[i]); });
}
inline Floats mul_pow2(Floats x, Floats n) {
  return each<Floats>([&](size_t i) { return x.v[i] * std::exp2(std::nearbyint(n.v[i])); });
}
inline Floats floor(Floats x) {
  return each<Floats>([&](size_t i) { return std::floor(x.v[i]); });
}
inline Floats fraction(Floats x) { return add(x, mul(floor(x), splat(-1))); }
inline Floats mul_pow2_floor(Floats x, Floats n) { return mul_pow2(x, floor(n)); }
inline void prefetch(const void*) {}
inline void spin_pause() {}

// Attention multiplies numbers rounded to bfloat16 in float32, K_STEP rows at a time.
constexpr int64_t K_STEP = 1;
using Lhs = float;
using KVector = Floats;
inline KVector load_k(const uint16_t* row, const uint16_t*, int64_t have) {
  return load_masked(row, have);
}
inline void dot(Floats& sum, KVector b, const Lhs* a) { sum = fma(b, splat(*a), sum); }
inline void store_lhs(Lhs* p, Floats x) {
  for (size_t i = 0; i < 16; i++) {
    uint16_t rounded;
    store_scalar(&rounded, x.v[i]);
    p[i] = to_float(rounded);
  }
}

}  // namespace
