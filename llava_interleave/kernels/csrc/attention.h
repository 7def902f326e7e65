// Attention over a KV cache in bfloat16 or int8.

#pragma once

#include "gemm.h"
#include "kv_cache.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#else
#include "attention_vector.h"
#endif

namespace {

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
      const uint16_t* from = q + token * stride + h * head.d;
      for (int64_t i = 0; i < head.d; i++) to_lhs(&scratch.q[m * scratch.q_stride + i], from[i]);
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
    AttentionScratch scratch(self.at + self.tokens, self.d, self.d);
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
