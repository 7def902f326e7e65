// Attention over a KV cache in bfloat16 or int8.

#pragma once

#include <cmath>
#include <limits>

#include "attention_int8.h"
#include "gemm.h"
#include "kv_cache.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#else
#include "attention_vector.h"
#endif

namespace {

// A thread's memory for a tile of queries.
struct AttentionScratch {
  AttentionProducts<int8_t> int8;
  AttentionProducts<uint16_t> bfloat16;
  AlignedArray<float> scores;       // [ROWS][BLOCK]
  AlignedArray<float> block_sums;   // [ROWS][16], of attention weights
  AlignedArray<float> out, totals;  // [MAX_QUERIES][width], [MAX_QUERIES][16]

  AttentionScratch(int64_t d, int64_t width)
      : int8(d, width),
        bfloat16(d, width),
        scores(aligned_array<float>(ROWS * BLOCK)),
        block_sums(aligned_array<float>(ROWS * PANEL)),
        out(aligned_array<float>(MAX_QUERIES * width)),
        totals(aligned_array<float>(MAX_QUERIES * PANEL)) {}

  template <class S>
  AttentionProducts<S>& products() {
    if constexpr (sizeof(S) == 1)
      return int8;
    else
      return bfloat16;
  }
};

// Attention of up to MAX_QUERIES queries, each over its first `lengths` tokens, which grow; block
// of keys after block with a running maximum (FlashAttention-2, arXiv 2307.08691). Blocks begin at
// multiples of BLOCK: what a query computes does not depend on the others.
template <class S>
void attend_tile(const KVHead<S>& head, int64_t rows, const int64_t* lengths,
                 AttentionScratch& scratch) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  [[maybe_unused]] const typename AttentionProducts<S>::Mode mode;
  auto& products = scratch.products<S>();
  const int64_t width = head.width;
  const float factor = float(1.4426950408889634 / std::sqrt(double(head.d)));
  float maxima[MAX_QUERIES];
  std::fill_n(maxima, rows, -INFINITE);
  std::fill_n(scratch.out.get(), rows * width, 0.0f);
  std::fill_n(scratch.totals.get(), rows * PANEL, 0.0f);
  for (int64_t begin = 0; begin < lengths[rows - 1]; begin += BLOCK) {
    products.load_block(head, begin, lengths[rows - 1], rows);
    for (int64_t first = 0; first < rows; first += ROWS) {
      const int64_t some = std::min(ROWS, rows - first);
      if (lengths[first + some - 1] <= begin) continue;
      products.multiply_keys(first, some, scratch.scores.get());
      // what earlier blocks have added up and what this one does is multiplied by 2 ** that
      float decays[ROWS + PANEL], gains[ROWS + PANEL] = {};
      for (int64_t m = 0; m < some; m++) {
        const int64_t visible = std::max<int64_t>(0, std::min(BLOCK, lengths[first + m] - begin));
        float* scores = &scratch.scores[m * BLOCK];
        const float of_query = products.factor(first + m) * factor,
                    scale = of_query == 0 ? 1 : of_query;
        Floats highest = splat(-INFINITE);
        for (int64_t t = 0; t < visible; t += PANEL) {
          store(scores + t, products.score(scores, t));
          if (t + PANEL > visible) std::fill(scores + visible, scores + t + PANEL, -INFINITE);
          highest = maximum(highest, load(scores + t));
        }
        const float maximum_here = visible ? largest(highest) * scale : -INFINITE,
                    next = std::max(maxima[first + m], maximum_here);
        const Floats below = splat(-maximum_here);
        Floats sum = splat(0);
        products.store_weights(m, visible, [&](int64_t t) {
          const Floats p = exp2_short(fma(load(scores + t), splat(scale), below));
          sum = add(sum, p);
          return p;
        });
        store(&scratch.block_sums[m * PANEL], sum);
        decays[m] = maxima[first + m] - next, gains[m] = maximum_here - next;
        maxima[first + m] = next;
      }
      for (int64_t m = 0; m < some; m += PANEL) {
        store(decays + m, exp2_short(load(decays + m)));
        store(gains + m, exp2_short(load(gains + m)));
      }
      products.multiply_values(some);
      for (int64_t m = 0; m < some; m++) {
        if (lengths[first + m] <= begin) continue;
        const Floats decay = splat(decays[m]), gain = splat(gains[m]);
        const auto accumulate = [&](float* to, Floats x) {
          store(to, fma(load(to), decay, mul(x, gain)));
        };
        accumulate(&scratch.totals[(first + m) * PANEL], load(&scratch.block_sums[m * PANEL]));
        for (int64_t i = 0; i < width; i += PANEL)
          accumulate(&scratch.out[(first + m) * width + i], products.sum(m, i));
      }
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    float total = 0;
    for (int64_t i = 0; i < PANEL; i++) total += scratch.totals[m * PANEL + i];
    for (int64_t i = m * width; i < (m + 1) * width; i += PANEL)
      store(&scratch.out[i], mul(load(&scratch.out[i]), splat(1 / total)));
  }
}

// A thread's memory for a layer.
struct Workspace {
  AttentionScratch attention;
  AlignedArray<float> row;
  UnpackBuffer unpack_buffer;
  Workspace(AttentionScratch attention, int64_t width, int64_t groups)
      : attention(std::move(attention)), row(aligned_array<float>(width)), unpack_buffer(groups) {}
};

// Queries of some tokens of a sequence, of the `group` heads that share a KV head (GQA). The first
// token attends to `visible` tokens; with `causal` each later one to one more.
struct Queries {
  const uint16_t* q;  // of the first token
  int64_t tokens, stride, group, visible;
  bool causal;

  int64_t tiles() const { return (tokens * group + MAX_QUERIES - 1) / MAX_QUERIES; }
  // Calls sink(token, head of the group, attention output) for a tile of queries.
  template <class S, class F>
  void attend(int64_t tile, const KVHead<S>& head, AttentionScratch& scratch, F&& sink) const {
    const int64_t first = tile * tokens * group / tiles(),
                  rows = (tile + 1) * tokens * group / tiles() - first;
    int64_t lengths[MAX_QUERIES];
    for (int64_t m = 0; m < rows; m++) {
      const int64_t token = (first + m) / group, h = (first + m) % group;
      scratch.products<S>().load_query(m, q + token * stride + h * head.d);
      lengths[m] = visible + (causal ? token : 0);
    }
    attend_tile(head, rows, lengths, scratch);
    for (int64_t m = 0; m < rows; m++)
      sink((first + m) / group, (first + m) % group, &scratch.out[m * head.width]);
  }
};

// Attention of the new tokens of a sequence.
template <class S>
struct Attention {
  const uint16_t *q, *k, *v;            // [tokens][heads][d], [tokens][kv heads][d] twice
  S *keys, *values;                     // [kv heads][d][capacity], [kv heads][capacity][d]
  uint16_t *key_scales, *value_scales;  // [kv heads][capacity], float16; int8 only
  uint16_t* out;
  int64_t tokens, heads, kv_heads, d, capacity, at;

  static void run(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Attention*>(context);
    AttentionScratch scratch(self.d, self.d);
    const TileRegisters registers;
    for (int64_t head = begin; head < end; head++) self.attend_head(head, scratch);
  }

  void attend_head(int64_t number, AttentionScratch& scratch) const {
    const int64_t group = heads / kv_heads, part = number * capacity;
    const KVHead<S> head{
        keys + part * d, values + part * d, key_scales, value_scales, part, d, capacity, d};
    head.append(at, tokens, k + number * d, v + number * d, kv_heads * d);
    const Queries queries{q + number * group * d, tokens, heads * d, group, at + 1, true};
    for (int64_t tile = 0; tile < queries.tiles(); tile++) {
      queries.attend(tile, head, scratch, [&](int64_t token, int64_t h, const float* x) {
        uint16_t* to = out + (token * heads + number * group + h) * d;
        for (int64_t i = 0; i < d; i += PANEL) store(to + i, load(x + i));
      });
    }
  }
};

template <class S>
void attend(ParallelFor parallel_for, const uint16_t* q, const uint16_t* k, const uint16_t* v,
            void* keys, void* values, uint16_t* key_scales, uint16_t* value_scales, uint16_t* out,
            int64_t tokens, int64_t heads, int64_t kv_heads, int64_t d, int64_t capacity,
            int64_t at) {
  Attention<S> self{q,
                    k,
                    v,
                    static_cast<S*>(keys),
                    static_cast<S*>(values),
                    key_scales,
                    value_scales,
                    out,
                    tokens,
                    heads,
                    kv_heads,
                    d,
                    capacity,
                    at};
  const int64_t work = 2 * tokens * heads / kv_heads * d * (at + tokens);
  parallel_for(0, kv_heads, std::max<int64_t>(1, MIN_PARALLEL_WORK / 4 / work), Attention<S>::run,
               &self);
}

}  // namespace
