// Products with quantised weights, attention of a few new tokens, and a decoder's layers made of both, for x86 with AVX-512 VNNI
// or AVX2: the flags say. A plain C interface without PyTorch's headers; the threads are PyTorch's own, handed in as its torch_parallel_for.
//
// A weight [out, in] lies in panels of 16 outputs and groups of 32 inputs, in the order in which it is read:
//   8 bits: [panels][groups][8 quads][16 outputs][4 inputs], each byte q + 128
//   4 bits: [panels][groups][4 pairs of quads][16 outputs][4 inputs], q + 8 of the pair's first quad in the low halves
//   scales: [panels][groups][16 outputs], float16
// Inputs are quantised to 8 bits in the same groups, a scale for each token and group. Products of a group are exact integers,
// groups are added in float32 in order: a token's result does not depend on how many others are computed with it.

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

constexpr int64_t GROUP = 32, PANEL = 16;
constexpr int64_t SERIAL = 1 << 17;  // multiplications that are not worth waking another thread for
constexpr int64_t NEAR = 256 << 10;  // bytes of inputs that stay in a core's second-level cache while weights pass by

// Sixteen lanes, one an output of a panel.
#if defined(__AVX512VNNI__)
constexpr int64_t TILE = 12;  // tokens that share a pass over a panel; their sums fill the registers
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
inline Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high(Bytes b) { return low(_mm512_srli_epi16(b, 4)); }
inline Ints ints(int32_t n) { return _mm512_set1_epi32(n); }
template <int BITS>
inline Ints dot(Ints sum, Bytes w, int32_t quad) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(quad)); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints n) { return _mm512_cvtepi32_ps(n); }
inline Floats halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const uint16_t* p) {  // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats shift(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x * 2 ** n
template <int BITS>
constexpr int32_t OFFSET = BITS == 4 ? 8 : 128;  // what a stored weight is above its value
#else
constexpr int64_t TILE = 4;
struct Bytes { __m256i a, b; };
struct Ints { __m256i a, b; };
struct Floats { __m256 a, b; };
inline Bytes bytes(const uint8_t* p) {
  auto q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline __m256i low(__m256i b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes low(Bytes x) { return {low(x.a), low(x.b)}; }
inline Bytes high(Bytes x) { return {low(_mm256_srli_epi16(x.a, 4)), low(_mm256_srli_epi16(x.b, 4))}; }
inline Ints ints(int32_t n) { return {_mm256_set1_epi32(n), _mm256_set1_epi32(n)}; }
template <int BITS>
inline __m256i dot(__m256i sum, __m256i w, __m256i x) {
  if constexpr (BITS == 8) {  // the sum of two products of a full byte would not fit 16 bits: signs go to the inputs
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
template <int BITS>
inline Ints dot(Ints sum, Bytes w, int32_t quad) {
  __m256i x = _mm256_set1_epi32(quad);
  return {dot<BITS>(sum.a, w.a, x), dot<BITS>(sum.b, w.b, x)};
}
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats to_floats(Ints n) { return {_mm256_cvtepi32_ps(n.a), _mm256_cvtepi32_ps(n.b)}; }
inline Floats halves(const uint16_t* p) {
  auto q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 load8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline __m256 load8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const int8_t* p) { return {load8(p), load8(p + 8)}; }
inline Floats load(const uint16_t* p) { return {load8(p), load8(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline Floats most(Floats a, Floats b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline __m256 nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats nearest(Floats x) { return {nearest(x.a), nearest(x.b)}; }
inline __m256 shift(__m256 x, __m256 n) {  // n is above -127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats shift(Floats x, Floats n) { return {shift(x.a, n.a), shift(x.b, n.b)}; }
template <int BITS>
constexpr int32_t OFFSET = BITS == 4 ? 8 : 0;
#endif

inline Floats plus(Floats a, Floats b) { return fma(a, splat(1), b); }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {  // bfloat16
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(int8_t x) { return x; }
inline float half(uint16_t x) { return _cvtsh_ss(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) {  // bfloat16, to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// Inputs of some tokens, quantised. Those of a tile lie together, [tiles][groups][tokens of the tile][32], and so do scales.
struct Inputs {
  int64_t tokens, groups, tiles;
  std::unique_ptr<int8_t[]> values;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int32_t[]> sums;  // of a group's values

  Inputs(int64_t tokens, int64_t groups)
      : tokens(tokens), groups(groups), tiles((tokens + TILE - 1) / TILE), values(new int8_t[tokens * groups * GROUP]),
        scales(new float[tokens * groups]), sums(new int32_t[tokens * groups]) {}
  int64_t first(int64_t tile) const { return tile * tokens / tiles; }  // tiles are as equal as they can be
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
  int64_t at(int64_t tile, int64_t m, int64_t group) const { return first(tile) * groups + group * size(tile) + m; }
  int64_t at(int64_t token, int64_t group) const {
    const int64_t tile = ((token + 1) * tiles - 1) / tokens;
    return at(tile, token - first(tile), group);
  }
  // A group of some token, `have` of it there: `at` says where it belongs.
  template <class T>
  void put(int64_t at, const T* from, int64_t have = GROUP);
};

// 32 numbers to 8 bits: value = round(x * 127 / largest), scale = largest / 127.
inline void quantise(const float* x, int8_t* value, float* scale, int32_t* sum) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 part[4];
  __m256i most = _mm256_setzero_si256();  // as integers, so that a NaN is the largest
  for (int i = 0; i < 4; i++) {
    part[i] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_andnot_ps(sign, part[i])));
  }
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
  const __m256 factor = _mm256_set1_ps(largest == 0 ? 0.0f : 127.0f / largest);
  __m256i whole[4], total = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], factor));
    total = _mm256_add_epi32(total, whole[i]);
  }
  __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
  packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(value), packed);
  __m128i rest = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0x4e));
  rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0xb1));
  *sum = _mm_cvtsi128_si32(rest);
  *scale = largest / 127.0f;
}

template <class T>
void Inputs::put(int64_t at, const T* from, int64_t have) {
  float wide[GROUP];
  if (have == GROUP) {
    store(wide, load(from));
    store(wide + PANEL, load(from + PANEL));
  } else {
    for (int64_t i = 0; i < GROUP; i++) wide[i] = i < have ? to_float(from[i]) : 0.0f;
  }
  quantise(wide, &values[at * GROUP], &scales[at], &sums[at]);
}

template <class T>
void quantise_tile(const T* x, int64_t in, Inputs& inputs, int64_t tile) {
  for (int64_t m = 0; m < inputs.size(tile); m++) {
    const T* row = x + (inputs.first(tile) + m) * in;
    for (int64_t g = 0; g < inputs.groups; g++) {
      inputs.put(inputs.at(tile, m, g), row + g * GROUP, std::min(GROUP, in - g * GROUP));
    }
  }
}

// A tile of M tokens by one panel -> [M][16].
template <int BITS, int M>
void product(const uint8_t* w, const uint16_t* scale, const Inputs& inputs, int64_t first, float* out) {
  constexpr int64_t BYTES = PANEL * GROUP * BITS / 8;
  const int8_t* x = &inputs.values[first * inputs.groups * GROUP];
  const float* x_scale = &inputs.scales[first * inputs.groups];
  const int32_t* x_sum = &inputs.sums[first * inputs.groups];
  Floats total[M];
  for (int m = 0; m < M; m++) total[m] = splat(0);
  for (int64_t g = 0; g < inputs.groups; g++, w += BYTES, scale += PANEL, x += M * GROUP, x_scale += M, x_sum += M) {
    auto quad = [&](int m, int q) {
      int32_t four;
      std::memcpy(&four, x + m * GROUP + 4 * q, 4);
      return four;
    };
    if constexpr (M == 1) {  // the processor's own prefetching ends with each page
      for (int64_t line = 0; line < BYTES; line += 64) _mm_prefetch(reinterpret_cast<const char*>(w) + 4096 + line, _MM_HINT_T0);
    }
    Ints sum[M];
    for (int m = 0; m < M; m++) sum[m] = ints(-OFFSET<BITS> * x_sum[m]);
#pragma GCC unroll 8
    for (int q = 0; q < 8; q += 8 / BITS) {
      const Bytes b = bytes(w + q * 8 * BITS);
      if constexpr (BITS == 4) {
        const Bytes one = low(b), two = high(b);
        for (int m = 0; m < M; m++) sum[m] = dot<BITS>(dot<BITS>(sum[m], one, quad(m, q)), two, quad(m, q + 1));
      } else {
        for (int m = 0; m < M; m++) sum[m] = dot<BITS>(sum[m], b, quad(m, q));
      }
    }
    const Floats step = halves(scale);
    for (int m = 0; m < M; m++) total[m] = fma(mul(to_floats(sum[m]), splat(x_scale[m])), step, total[m]);
  }
  for (int m = 0; m < M; m++) store(out + m * PANEL, total[m]);
}

template <int BITS, int M = TILE>
void product(int64_t count, const uint8_t* w, const uint16_t* scale, const Inputs& inputs, int64_t first, float* out) {
  if (count == M) return product<BITS, M>(w, scale, inputs, first, out);
  if constexpr (M > 1) product<BITS, M - 1>(count, w, scale, inputs, first, out);
}

// The same for the tokens of any tile -> [tokens of the tile][16].
void product(int64_t bits, const uint8_t* weight, const uint16_t* scale, const Inputs& inputs, int64_t tile, int64_t panel,
             float* out) {
  const int64_t begin = panel * inputs.groups * PANEL, first = inputs.first(tile), count = inputs.size(tile);
  (bits == 4 ? product<4> : product<8>)(count, weight + begin * GROUP * bits / 8, scale + begin, inputs, first, out);
}

template <class T>
struct Linear {
  int32_t bits;
  const T* x;
  const uint8_t* weight;
  const uint16_t* scale;
  const T* bias;
  T* y;
  int64_t in, out, panels, tiles_a_block;
  Inputs inputs;

  static void quantise_some(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Linear*>(context);
    for (int64_t tile = begin; tile < end; tile++) quantise_tile(self.x, self.in, self.inputs, tile);
  }

  // Tasks are panels within blocks of tiles: a block's inputs stay near while the weights pass by.
  static void multiply_some(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Linear*>(context);
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task / self.panels, panel = task % self.panels;
      const int64_t last = std::min(self.inputs.tiles, (block + 1) * self.tiles_a_block);
      for (int64_t tile = block * self.tiles_a_block; tile < last; tile++) self.multiply(tile, panel);
    }
  }

  void multiply(int64_t tile, int64_t panel) const {
    float rows[TILE * PANEL];
    product(bits, weight, scale, inputs, tile, panel, rows);
    const int64_t at = panel * PANEL, width = std::min(PANEL, out - at);
    for (int64_t m = 0; m < inputs.size(tile); m++) {
      T* to = y + (inputs.first(tile) + m) * out + at;
      for (int64_t i = 0; i < width; i++) put(to + i, rows[m * PANEL + i] + (bias ? to_float(bias[at + i]) : 0));
    }
  }
};

template <class T>
void linear(ParallelFor parallel_for, int32_t bits, const void* x, const uint8_t* weight, const uint16_t* scale, const void* bias,
            void* y, int64_t tokens, int64_t in, int64_t out) {
  if (!tokens) return;
  const int64_t groups = (in + GROUP - 1) / GROUP, panels = (out + PANEL - 1) / PANEL;
  const int64_t near = std::max<int64_t>(1, NEAR / (TILE * groups * GROUP));
  Linear<T> self{bits, static_cast<const T*>(x), weight, scale, static_cast<const T*>(bias), static_cast<T*>(y), in, out, panels,
                 near, Inputs(tokens, groups)};
  const int64_t tiles = self.inputs.tiles, blocks = (tiles + near - 1) / near;
  parallel_for(0, tiles, std::max<int64_t>(1, SERIAL / (TILE * groups * GROUP)), Linear<T>::quantise_some, &self);
  const int64_t work = PANEL * groups * GROUP * std::min(tokens, near * TILE);
  parallel_for(0, blocks * panels, std::max<int64_t>(1, SERIAL / work), Linear<T>::multiply_some, &self);
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

// Attention of a few new tokens of a sequence. Keys lie as [kv heads][d][capacity], values as [kv heads][capacity][d], in
// bfloat16, or in 8 bits with a scale for each head and token. Each token is computed as it would be alone; a head's keys and
// values come from memory for the first, and lie near for the others.
template <class S>
struct Attention {
  const uint16_t *q, *k, *v;  // [tokens][heads][d] and twice [tokens][kv heads][d]
  S *keys, *values;
  uint16_t *key_scales, *value_scales;  // [kv heads][capacity], float16; with 8 bits
  uint16_t* out;
  int64_t tokens, heads, kv_heads, d, capacity, at;
  static constexpr bool SCALED = sizeof(S) == 1;

  static void some(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Attention*>(context);
    std::unique_ptr<float[]> scores(new float[self.at + self.tokens + PANEL]);
    for (int64_t head = begin; head < end; head++) {
      const int64_t group = self.heads / self.kv_heads;
      for (int64_t token = 0; token < self.tokens; token++) {
        self.keep(token, head);
        for (int64_t h = head * group; h < (head + 1) * group; h++) self.one(token, h, head, scores.get());
      }
    }
  }

  // Puts a token's key and value to their place.
  void keep(int64_t token, int64_t head) const {
    const uint16_t *key = k + (token * kv_heads + head) * d, *value = v + (token * kv_heads + head) * d;
    const int64_t to = at + token;
    if constexpr (SCALED) {
      const float by_key = scale(key, &key_scales[head * capacity + to]);
      const float by_value = scale(value, &value_scales[head * capacity + to]);
      for (int64_t i = 0; i < d; i++) keys[(head * d + i) * capacity + to] = whole(to_float(key[i]), by_key);
      for (int64_t i = 0; i < d; i++) values[(head * capacity + to) * d + i] = whole(to_float(value[i]), by_value);
    } else {
      for (int64_t i = 0; i < d; i++) keys[(head * d + i) * capacity + to] = key[i];
      std::memcpy(values + (head * capacity + to) * d, value, d * sizeof(uint16_t));
    }
  }

  float scale(const uint16_t* x, uint16_t* to) const {
    float largest = 0;
    for (int64_t i = 0; i < d; i++) largest = std::max(largest, std::abs(to_float(x[i])));
    *to = _cvtss_sh(largest / 127, _MM_FROUND_TO_NEAREST_INT);
    return half(*to);
  }

  static int8_t whole(float x, float scale) {
    return scale == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x / scale))));
  }

  void one(int64_t token, int64_t h, int64_t head, float* scores) const {
    const S *keys = this->keys + head * d * capacity, *values = this->values + head * capacity * d;
    const uint16_t* q = this->q + (token * heads + h) * d;
    const int64_t length = at + token + 1, whole = length / PANEL * PANEL;
    const float root = 1 / std::sqrt(float(d));
    std::memset(scores, 0, length * sizeof(float));
    for (int64_t i = 0; i < d; i += 8) {  // eight rows of keys at a time, each read from its beginning to its end
      const S* row = keys + i * capacity;
      float by[8];
      for (int64_t j = 0; j < 8; j++) by[j] = to_float(q[i + j]) * root;
      for (int64_t t = 0; t < whole; t += PANEL) {
        Floats sum = load(scores + t);
        for (int64_t j = 0; j < 8; j++) sum = fma(load(row + j * capacity + t), splat(by[j]), sum);
        store(scores + t, sum);
      }
      for (int64_t t = whole; t < length; t++) {
        for (int64_t j = 0; j < 8; j++) scores[t] += to_float(row[j * capacity + t]) * by[j];
      }
    }
    times(scores, key_scales + head * capacity, length);
    const float largest = *std::max_element(scores, scores + length);
    const int64_t padded = (length + PANEL - 1) / PANEL * PANEL;
    std::fill(scores + length, scores + padded, -std::numeric_limits<float>::infinity());
    Floats sum = splat(0);
    for (int64_t t = 0; t < padded; t += PANEL) {
      const Floats p = exponential(fma(splat(-1), splat(largest), load(scores + t)));
      store(scores + t, p);
      sum = fma(p, splat(1), sum);
    }
    float parts[PANEL], total = 0;
    store(parts, sum);
    for (float part : parts) total += part;
    times(scores, value_scales + head * capacity, length);
    uint16_t* to = out + (token * heads + h) * d;
    int64_t i = 0;
    for (; i + 4 * PANEL <= d; i += 4 * PANEL) mix<4>(scores, values + i, length, 1 / total, to + i);
    for (; i < d; i += PANEL) mix<1>(scores, values + i, length, 1 / total, to + i);
  }

  // Of 8 bits, a token's score or share by its scale.
  static void times(float* x, const uint16_t* scales, int64_t length) {
    if constexpr (SCALED) {
      int64_t t = 0;
      for (; t + PANEL <= length; t += PANEL) store(x + t, mul(load(x + t), halves(scales + t)));
      for (; t < length; t++) x[t] *= half(scales[t]);
    }
  }

  template <int N>
  void mix(const float* p, const S* values, int64_t length, float factor, uint16_t* to) const {
    Floats sum[N];
    for (int n = 0; n < N; n++) sum[n] = splat(0);
    for (int64_t t = 0; t < length; t++, values += d) {
      for (int n = 0; n < N; n++) sum[n] = fma(load(values + n * PANEL), splat(p[t]), sum[n]);
    }
    float row[PANEL];
    for (int n = 0; n < N; n++) {
      store(row, sum[n]);
      for (int64_t i = 0; i < PANEL; i++) put(to + n * PANEL + i, row[i] * factor);
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

    // Calls task(i) once for each i below `count`, some neighbours at a time, in any of the threads; returns when all are done.
    template <class F>
    void each(int64_t count, F&& task) {
      std::atomic<int64_t>& begun = team.begun[piece++];
      const int64_t grain = std::max<int64_t>(1, count / (4 * team.size));
      for (int64_t i; (i = begun.fetch_add(grain)) < count;) {
        for (const int64_t end = std::min(count, i + grain); i < end; i++) task(i);
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

// As the caller lays them out, in words of 64 bits.
struct Weight {
  int64_t bits;
  const uint8_t* values;
  const uint16_t *scales, *bias;
};
struct LayerWeights {
  const uint16_t *before_attention, *before_mlp;
  Weight q, k, v, o, gate, up, down;
};
struct Memory {  // of a sequence, in a layer
  void *keys, *values;
  uint16_t *key_scales, *value_scales;
};
struct Sequence {
  int64_t first, count, at, capacity;  // its rows among the tokens, and their place in its memory
  const Memory* memory;                // by layer
};
struct Shape {
  int64_t layers, width, inner, heads, kv_heads, d;
};

// The layers of a Qwen2 decoder for a few new tokens of some sequences. Queries, keys, values and what attention gives are
// bfloat16, everything else is float32 from the first layer to the last.
struct Decoder : Shape {
  const LayerWeights* weights;
  const int64_t tokens;
  const float eps;
  const Sequence* sequences;
  const int64_t sequence_count;
  const uint16_t *cosines, *sines;  // [tokens][d]
  Team team;
  Inputs normed, attended, gated;
  std::unique_ptr<float[]> x, projected;     // [tokens][width], [tokens][heads of q, k and v][d]
  std::unique_ptr<uint16_t[]> q, k, v, seen;  // [tokens][heads or kv heads][d]

  Decoder(const Shape& shape, int64_t threads, const LayerWeights* weights, int64_t tokens, float eps, const Sequence* sequences,
          int64_t sequence_count, const uint16_t* cosines, const uint16_t* sines)
      : Shape(shape), weights(weights), tokens(tokens), eps(eps), sequences(sequences), sequence_count(sequence_count),
        cosines(cosines), sines(sines), team(threads, 7 * layers), normed(tokens, width / GROUP),
        attended(tokens, heads * d / GROUP), gated(tokens, inner / GROUP), x(new float[tokens * width]),
        projected(new float[tokens * (heads + 2 * kv_heads) * d]), q(new uint16_t[tokens * heads * d]),
        k(new uint16_t[tokens * kv_heads * d]), v(new uint16_t[tokens * kv_heads * d]), seen(new uint16_t[tokens * heads * d]) {}

  static void some(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Decoder*>(context);
    Team::Member member(self.team, end - begin);
    for (int64_t layer = 0; layer < self.layers; layer++) self.one(member, layer);
  }

  void one(Team::Member& team, int64_t layer) {
    const LayerWeights& w = weights[layer];
    const int64_t q_panels = heads * d / PANEL, kv_panels = kv_heads * d / PANEL, panels = q_panels + 2 * kv_panels;
    auto add = [this](int64_t token, int64_t panel, Floats y) {
      float* to = &x[token * width + panel * PANEL];
      store(to, plus(y, load(to)));
    };
    team.each(tokens, [&](int64_t token) { norm(token, w.before_attention); });
    team.each(panels, [&](int64_t panel) {
      const Weight& part = panel < q_panels ? w.q : panel < q_panels + kv_panels ? w.k : w.v;
      const int64_t first = panel < q_panels ? 0 : panel < q_panels + kv_panels ? q_panels : q_panels + kv_panels;
      multiply(part, normed, panel - first, [&](int64_t token, int64_t, Floats y) {
        store(&projected[(token * panels + panel) * PANEL], y);
      });
    });
    team.each(sequence_count * kv_heads, [&](int64_t task) {
      const Sequence& s = sequences[task / kv_heads];
      s.memory[layer].key_scales ? attend<int8_t>(s, layer, task % kv_heads) : attend<uint16_t>(s, layer, task % kv_heads);
    });
    team.each(width / PANEL, [&](int64_t panel) { multiply(w.o, attended, panel, add); });
    team.each(tokens, [&](int64_t token) { norm(token, w.before_mlp); });
    team.each(inner / GROUP, [&](int64_t group) { gate(w, group); });
    team.each(width / PANEL, [&](int64_t panel) { multiply(w.down, gated, panel, add); });
  }

  void norm(int64_t token, const uint16_t* weight) {
    const float* row = &x[token * width];
    Floats squares = splat(0);
    for (int64_t i = 0; i < width; i += PANEL) squares = fma(load(row + i), load(row + i), squares);
    float parts[PANEL], sum = 0, wide[GROUP];
    store(parts, squares);
    for (float part : parts) sum += part;
    const Floats factor = splat(1 / std::sqrt(sum / width + eps));
    for (int64_t g = 0; g < width / GROUP; g++) {
      for (int64_t i = 0; i < GROUP; i += PANEL) {
        store(wide + i, mul(mul(load(row + g * GROUP + i), factor), load(weight + g * GROUP + i)));
      }
      normed.put(normed.at(token, g), wide);
    }
  }

  // put(token, panel, the panel's 16 outputs) for every token.
  template <class F>
  void multiply(const Weight& w, const Inputs& inputs, int64_t panel, F&& put) const {
    const Floats bias = w.bias ? load(w.bias + panel * PANEL) : splat(0);
    float rows[TILE * PANEL];
    for (int64_t tile = 0; tile < inputs.tiles; tile++) {
      product(w.bits, w.values, w.scales, inputs, tile, panel, rows);
      for (int64_t m = 0; m < inputs.size(tile); m++) put(inputs.first(tile) + m, panel, plus(load(rows + m * PANEL), bias));
    }
  }

  template <class S>
  void attend(const Sequence& s, int64_t layer, int64_t head) {
    const int64_t group = heads / kv_heads;
    for (int64_t token = s.first; token < s.first + s.count; token++) {
      const float* row = &projected[token * (heads + 2 * kv_heads) * d];
      for (int64_t h = head * group; h < (head + 1) * group; h++) rotate(token, row + h * d, &q[(token * heads + h) * d]);
      rotate(token, row + (heads + head) * d, &k[(token * kv_heads + head) * d]);
      for (int64_t i = 0; i < d; i++) put(&v[(token * kv_heads + head) * d + i], row[(heads + kv_heads + head) * d + i]);
    }
    const Memory& m = s.memory[layer];
    Attention<S> attention{&q[s.first * heads * d], &k[s.first * kv_heads * d], &v[s.first * kv_heads * d],
                           static_cast<S*>(m.keys), static_cast<S*>(m.values), m.key_scales, m.value_scales,
                           &seen[s.first * heads * d], s.count, heads, kv_heads, d, s.capacity, s.at};
    Attention<S>::some(head, head + 1, &attention);
    for (int64_t token = s.first; token < s.first + s.count; token++) {
      for (int64_t g = head * group * d / GROUP; g < (head + 1) * group * d / GROUP; g++) {
        attended.put(attended.at(token, g), &seen[token * heads * d + g * GROUP]);
      }
    }
  }

  // The two halves of a head against each other.
  void rotate(int64_t token, const float* from, uint16_t* to) const {
    const uint16_t *cosine = cosines + token * d, *sine = sines + token * d;
    for (int64_t i = 0; i < d / 2; i++) {
      const float a = from[i], b = from[i + d / 2];
      put(to + i, a * to_float(cosine[i]) - b * to_float(sine[i]));
      put(to + i + d / 2, b * to_float(cosine[i + d / 2]) + a * to_float(sine[i + d / 2]));
    }
  }

  // silu(gate) * up for a group of 32, as the next product reads it.
  void gate(const LayerWeights& w, int64_t group) {
    float gates[2][TILE * PANEL], ups[2][TILE * PANEL], wide[GROUP];
    for (int64_t tile = 0; tile < normed.tiles; tile++) {
      for (int64_t half = 0; half < 2; half++) {
        product(w.gate.bits, w.gate.values, w.gate.scales, normed, tile, 2 * group + half, gates[half]);
        product(w.up.bits, w.up.values, w.up.scales, normed, tile, 2 * group + half, ups[half]);
      }
      for (int64_t m = 0; m < normed.size(tile); m++) {
        for (int64_t half = 0; half < 2; half++) {
          const float *g = &gates[half][m * PANEL], *u = &ups[half][m * PANEL];
          float e[PANEL];
          for (int64_t i = 0; i < PANEL; i++) e[i] = -std::abs(g[i]);
          store(e, exponential(load(e)));
          for (int64_t i = 0; i < PANEL; i++) wide[half * PANEL + i] = g[i] * u[i] * (g[i] < 0 ? e[i] : 1) / (1 + e[i]);
        }
        gated.put(gated.at(tile, m, group), wide);
      }
    }
  }
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

// What a decoder's layers make of the hidden states [tokens, width], in place, bfloat16. Biases are there for q, k and v alone;
// width, inner and d are multiples of 32.
extern "C" void llava_decode(ParallelFor parallel_for, int64_t threads, const Shape* shape, const LayerWeights* weights, float eps,
                             const Sequence* sequences, int64_t sequence_count, const uint16_t* cosines, const uint16_t* sines,
                             uint16_t* hidden, int64_t tokens) {
  Decoder self(*shape, threads, weights, tokens, eps, sequences, sequence_count, cosines, sines);
  for (int64_t i = 0; i < tokens * self.width; i++) self.x[i] = to_float(hidden[i]);
  parallel_for(0, threads, 1, Decoder::some, &self);
  for (int64_t i = 0; i < tokens * self.width; i++) put(hidden + i, self.x[i]);
}
