// Vectors of sixteen lanes for ARM with NEON and its 8-bit dot products; matrix products of 8-bit
// numbers are in gemm.h.

#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace {

constexpr int ACCUMULATORS = 6;  // of attention, in registers
constexpr int ZERO = 0;          // products take q + ZERO

// Four registers each. `each` calls f(register number).
struct Bytes {
  uint8x16_t v[4];
};
struct Ints {
  int32x4_t v[4];
};
struct Floats {
  float32x4_t v[4];
};
struct Bfloat16s {
  uint16x8_t v[2];
};
template <class V, class F>
inline V each(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Bytes bytes(const uint8_t* p) {
  return each<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); });
}
inline void store(uint8_t* p, Bytes b) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, b.v[i]);
}
inline Bytes splat8(int8_t n) {
  return each<Bytes>([&](int) { return vdupq_n_u8(n); });
}
inline Bytes low_nibbles(Bytes b) {
  return each<Bytes>([&](int i) { return vandq_u8(b.v[i], vdupq_n_u8(15)); });
}
inline Bytes high_nibbles(Bytes b) {
  return each<Bytes>([&](int i) { return vshrq_n_u8(b.v[i], 4); });
}
inline Bytes even_bytes(Bytes b) {
  const uint8x16_t even = vreinterpretq_u8_u16(vdupq_n_u16(255));
  return each<Bytes>([&](int i) { return vandq_u8(b.v[i], even); });
}
inline Bytes broadcast_byte(Bytes fours, int i) {  // byte i of each four, four times
  const uint8x16_t first = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  return each<Bytes>([&](int n) { return vqtbl1q_u8(fours.v[n], vaddq_u8(first, vdupq_n_u8(i))); });
}
inline Bytes mul16(Bytes a, Bytes b) {  // 16-bit lanes
  return each<Bytes>([&](int i) {
    return vreinterpretq_u8_u16(
        vmulq_u16(vreinterpretq_u16_u8(a.v[i]), vreinterpretq_u16_u8(b.v[i])));
  });
}
inline Bytes add(Bytes a, Bytes b) {
  return each<Bytes>([&](int i) { return vaddq_u8(a.v[i], b.v[i]); });
}
inline Bytes sub8(Bytes a, Bytes b) {
  return each<Bytes>([&](int i) { return vsubq_u8(a.v[i], b.v[i]); });
}
inline Ints splat32(int32_t n) {
  return each<Ints>([&](int) { return vdupq_n_s32(n); });
}
inline Ints add32(Ints a, Ints b) {
  return each<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline void dot(Ints& sum, Bytes w, const int8_t* quad) {
  const int8x16_t x = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const Word*>(quad)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), x);
}

inline void dot_positive(Ints& sum, Bytes b, const int8_t* quad) { dot(sum, b, quad); }
inline Ints load(const int32_t* p) {
  return each<Ints>([&](int i) { return vld1q_s32(p + 4 * i); });
}
inline void store(int32_t* p, Ints n) {
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, n.v[i]);
}
inline void store(int8_t* p, Ints n) {
  vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(n.v[0]), vmovn_s32(n.v[1]))),
                          vmovn_s16(vcombine_s16(vmovn_s32(n.v[2]), vmovn_s32(n.v[3])))));
}
// The upper and the lower 7 bits of 64 numbers.
inline void store_planes(int8_t* high, int8_t* low, const Ints (&n)[4]) {
  for (int j = 0; j < 4; j++) {
    store(high + 16 * j, each<Ints>([&](int i) { return vshrq_n_s32(n[j].v[i], 7); }));
    store(low + 16 * j, each<Ints>([&](int i) { return vandq_s32(n[j].v[i], vdupq_n_s32(127)); }));
  }
}
inline Ints join_planes(Ints high, Ints low) {
  return each<Ints>([&](int i) { return vaddq_s32(vshlq_n_s32(high.v[i], 7), low.v[i]); });
}
constexpr int WIDE = 1;  // panels that `interleave` makes at once
inline void restore_order(Ints (&)[WIDE]) {}
inline void restore_order(Bytes (&)[WIDE]) {}
// Four rows of WIDE panels as columns of four, each + zero.
inline void interleave(const int8_t* row, int64_t stride, int8_t zero, Bytes (&out)[WIDE]) {
  const auto bytes = [&](int i) { return vaddq_s8(vld1q_s8(row + i * stride), vdupq_n_s8(zero)); };
  const int16x8x2_t low = {{vreinterpretq_s16_s8(vzip1q_s8(bytes(0), bytes(1))),
                            vreinterpretq_s16_s8(vzip2q_s8(bytes(0), bytes(1)))}},
                    high = {{vreinterpretq_s16_s8(vzip1q_s8(bytes(2), bytes(3))),
                             vreinterpretq_s16_s8(vzip2q_s8(bytes(2), bytes(3)))}};
  out[0] = each<Bytes>([&](int i) {
    const int16x8_t a = low.val[i / 2], b = high.val[i / 2];
    return vreinterpretq_u8_s16(i % 2 ? vzip2q_s16(a, b) : vzip1q_s16(a, b));
  });
}

inline Floats splat(float x) {
  return each<Floats>([&](int) { return vdupq_n_f32(x); });
}
inline Ints to_ints(Floats x) {
  return each<Ints>([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
}
inline float largest(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline Floats to_floats(Ints n) {
  return each<Floats>([&](int i) { return vcvtq_f32_s32(n.v[i]); });
}
inline Floats load_half(const uint16_t* p) {
  return each<Floats>(
      [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline Floats load(const float* p) {
  return each<Floats>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline Floats widen_bfloat16(Bfloat16s x) {
  return each<Floats>([&](int i) {
    const uint16x4_t half = i % 2 ? vget_high_u16(x.v[i / 2]) : vget_low_u16(x.v[i / 2]);
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  });
}
inline Floats load(const uint16_t* p) { return widen_bfloat16({{vld1q_u16(p), vld1q_u16(p + 8)}}); }
inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline Floats add(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Floats mul(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Floats div(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Floats maximum(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
inline Floats minimum(Floats a, Floats b) {
  return each<Floats>([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline Floats select_by_sign(Floats x, Floats positive, Floats negative) {
  return each<Floats>([&](int i) {
    const uint32x4_t is_negative = vcltzq_s32(vreinterpretq_s32_f32(x.v[i]));
    return vbslq_f32(is_negative, negative.v[i], positive.v[i]);
  });
}
inline Floats round_even(Floats x) {
  return each<Floats>([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline Floats mul_pow2(Floats x, Floats n) {  // n is above -127
  return each<Floats>([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}
inline Floats floor(Floats x) {
  return each<Floats>([&](int i) { return vrndmq_f32(x.v[i]); });
}
inline Floats fraction(Floats x) { return add(x, mul(floor(x), splat(-1))); }
inline Floats mul_pow2_floor(Floats x, Floats n) { return mul_pow2(x, floor(n)); }
inline Floats load_masked(const uint16_t* p, int64_t have) {
  uint16_t some[16] = {};
  return load(
      have < 16 ? static_cast<const uint16_t*>(std::memcpy(some, p, have * sizeof(uint16_t))) : p);
}
inline uint16x4_t to_bfloat16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x),
                   odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), nearest, vdupq_n_u32(0x7fc00000)), 16);
}
inline Bfloat16s to_bfloat16(Floats x) {
  return {{vcombine_u16(to_bfloat16(x.v[0]), to_bfloat16(x.v[1])),
           vcombine_u16(to_bfloat16(x.v[2]), to_bfloat16(x.v[3]))}};
}
inline void store(uint16_t* p, Floats x) {
  const Bfloat16s y = to_bfloat16(x);
  vst1q_u16(p, y.v[0]), vst1q_u16(p + 8, y.v[1]);
}

inline float half_to_float(uint16_t x) {
  __fp16 half;
  std::memcpy(&half, &x, 2);
  return half;
}
inline uint16_t to_half(float x) {
  const __fp16 half = x;
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void spin_pause() { asm volatile("yield"); }

// Attention multiplies numbers rounded to bfloat16 in float32, K_STEP rows at a time.
constexpr int64_t K_STEP = 1;
using Lhs = float;
using KVector = Floats;
inline KVector load_k(const uint16_t* row, const uint16_t*, int64_t have) {
  return load_masked(row, have);
}
inline void dot(Floats& sum, KVector b, const Lhs* a) { sum = fma(b, splat(*a), sum); }
inline void store_lhs(Lhs* p, Floats x) { store(p, widen_bfloat16(to_bfloat16(x))); }

}  // namespace
