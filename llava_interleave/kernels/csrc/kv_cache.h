// KV cache of a head in one layer, in bfloat16 or int8.

#pragma once

#include <cmath>

#include "simd.h"

namespace {

// KV cache of a head: keys [d][capacity] and values [capacity][width], of which the first d count;
// bfloat16, or int8 with a float16 scale per token.
template <class S>
struct KVHead {
  S *keys, *values;
  uint16_t *key_scales, *value_scales;  // of all heads
  int64_t first_scale, d, capacity, width;
  static constexpr bool SCALED = sizeof(S) == 1;
  static constexpr int64_t PREFETCH_TOKENS = 8;

  // Writes keys and values of `count` tokens, `stride` apart, to the positions from `place` on.
  void append(int64_t place, int64_t count, const uint16_t* key, const uint16_t* value,
              int64_t stride) const {
    for (int64_t last = place + count; place < last; place++, key += stride, value += stride) {
      // the hardware prefetcher does not follow rows so far apart
      for (int64_t i = 0; i < d; i += 32) {
        prefetch(key + PREFETCH_TOKENS * stride + i);
        prefetch(value + PREFETCH_TOKENS * stride + i);
      }
      if constexpr (SCALED) {
        const float by_key = scale(key, &key_scales[first_scale + place]);
        const float by_value = scale(value, &value_scales[first_scale + place]);
        for (int64_t i = 0; i < d; i++)
          keys[i * capacity + place] = rounded(to_float(key[i]), by_key);
        for (int64_t i = 0; i < d; i++)
          values[place * width + i] = rounded(to_float(value[i]), by_value);
      } else {
        for (int64_t i = 0; i < d; i++) keys[i * capacity + place] = key[i];
        std::memcpy(values + place * width, value, d * sizeof(uint16_t));
      }
    }
  }

  float scale(const uint16_t* x, uint16_t* to) const {
    float largest = 0;
    for (int64_t i = 0; i < d; i++) largest = std::max(largest, std::abs(to_float(x[i])));
    *to = to_half(largest / 127);
    return half_to_float(*to);
  }

  static int8_t rounded(float x, float scale) {
    return scale == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x / scale))));
  }

  Floats scales(const uint16_t* from, int64_t t, int64_t length) const {
    from += first_scale + t;
    if (t + PANEL <= length) return load_half(from);
    uint16_t some[PANEL] = {};
    std::memcpy(some, from, (length - t) * sizeof(uint16_t));
    return load_half(some);
  }
};

// Products of some queries with a block of a KV cache, and a thread's memory for them.
template <class S>
struct AttentionProducts;

}  // namespace
