// Vectors of sixteen lanes (AVX2, AVX-VNNI, AVX-512, NEON or none of them, as the compiler's flags
// say), tile registers of AMX, aligned memory, bfloat16.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body,
                                void* context);

constexpr int64_t GROUP = 128, SUBGROUP = 32, PANEL = 16;
constexpr int QUADS = GROUP / 4, SUBGROUPS = GROUP / SUBGROUP;
constexpr int64_t MIN_PARALLEL_WORK =
    1 << 17;  // multiply-adds below which another thread is not worth waking

typedef int32_t __attribute__((__may_alias__)) Word;  // four 8-bit or two 16-bit numbers

// TILE: tokens that share a pass over a panel. MAX_QUERIES: queries that share a pass over the KV
// cache, ROWS of them at a time; BLOCK: its tokens that they multiply with before the next.
// L2_BYTES: of activations that stay in a core's L2 cache while weights stream by.
// DOT_PRODUCTS: the instruction set has dot products of 8-bit numbers.
#if defined(__AMX_INT8__)
constexpr int64_t TILE = 16, ROWS = 32, MAX_QUERIES = 256, L2_BYTES = 1 << 20;
#elif defined(__AVX512VNNI__)
constexpr int64_t TILE = 12, ROWS = 12, MAX_QUERIES = 96, L2_BYTES = 256 << 10;
#elif defined(__AVXVNNI__)
constexpr int64_t TILE = 4, ROWS = 6, MAX_QUERIES = 48, L2_BYTES = 256 << 10;
#elif !defined(__AVX2__)  // NEON, scalar
constexpr int64_t TILE = 4, ROWS = 6, MAX_QUERIES = 48, L2_BYTES = 256 << 10;
#else
constexpr int64_t TILE = 12, ROWS = 6, MAX_QUERIES = 48, L2_BYTES = 256 << 10;
#endif
constexpr int64_t BLOCK = 256;
#if defined(__AMX_INT8__)
constexpr int64_t MIN_TILE_ROWS = 8;             // rows from which on tile registers are faster
constexpr int64_t MAX_ROWS = MIN_TILE_ROWS - 1;  // of a product in vector registers
#else
constexpr int64_t MAX_ROWS = TILE;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
#define DOT_PRODUCTS
#endif

}  // namespace

#if defined(__aarch64__)
#include "simd_neon.h"
#elif defined(__AVX2__)
#include "simd_x86.h"
#else
#include "simd_scalar.h"
#endif

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

// 2 ** x for x <= 0, relative error 3e-6 (minimax on [0, 1)), at least 2 ** -126.
inline Floats exp2_short(Floats x) {
  x = maximum(splat(-126), x);  // this order of operands keeps a NaN
  const Floats r = fraction(x);
  Floats y = splat(0.0135341676f);
  for (float c : {0.0520114639f, 0.241442753f, 0.693003836f, 1.00000259f}) y = fma(y, r, splat(c));
  return mul_pow2_floor(y, x);
}

// 1 / (1 + e ** -x)
inline Floats sigmoid(Floats x) {
  const Floats e = exponential(minimum(x, mul(x, splat(-1))));
  return div(select_by_sign(x, splat(1), e), add(e, splat(1)));
}

// Panels of columns of a product whose sums fit the registers with so many rows.
constexpr int panels_per_pass(int rows) {
  int n = 1;
  while (2 * n * rows <= ACCUMULATORS && n < 8) n *= 2;
  return n;
}

inline int64_t round_up(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {  // bfloat16
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void store_scalar(float* p, float x) { *p = x; }
inline void store_scalar(uint16_t* p, float x) {  // bfloat16, to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline void to_lhs(uint16_t* to, uint16_t x) { *to = x; }
inline void to_lhs(float* to, uint16_t x) { *to = to_float(x); }

// The tile registers of a thread while its object lives: eight of 16 rows of 64 bytes.
class TileRegisters {
 public:
#if defined(__AMX_TILE__)
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    std::fill_n(config.row_bytes, 8, 64), std::fill_n(config.rows, 8, 16);
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
#else
  TileRegisters() {}
#endif
  TileRegisters(const TileRegisters&) = delete;
};

// GCC does not know that loads of tiles read memory: no store may move behind them.
inline void finish_stores() { asm volatile("" ::: "memory"); }

struct FreeDeleter {
  void operator()(void* p) const {
#if defined(_WIN32)
    _aligned_free(p);
#else
    std::free(p);
#endif
  }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], FreeDeleter>;

// Aligned to cache lines, so that no vector crosses one; large arrays in huge pages where the
// system has them.
template <class T>
AlignedArray<T> aligned_array(int64_t count) {
  constexpr size_t line = 64, page = 2 << 20;
  const size_t size = count * sizeof(T), unit = size < 2 * page ? line : page,
               padded = std::max<size_t>(1, (size + unit - 1) / unit) * unit;
#if defined(_WIN32)
  void* p = _aligned_malloc(padded, unit);
#else
  void* p = std::aligned_alloc(unit, padded);
#endif
  if (!p) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (unit == page) madvise(p, padded, MADV_HUGEPAGE);
#endif
  return AlignedArray<T>(static_cast<T*>(p));
}

}  // namespace
