// What training computes in float32 besides large products: causal attention of packed sequences,
// RMSNorm, rotary embedding, SwiGLU, and their gradients. No result depends on the number of
// threads.

#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "simd.h"

namespace {

// Calls task(i) once for each i below `count`, on `threads` threads; a thread that is done takes
// the next one. `make` makes a thread's memory.
template <class Make, class Task>
void for_each_task(ParallelFor parallel_for, int64_t threads, int64_t count, const Make& make,
                   const Task& task) {
  struct Shared {
    const Make& make;
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next;
    static void run(int64_t, int64_t, void* context) {
      auto& self = *static_cast<Shared*>(context);
      int64_t i = self.next++;
      if (i >= self.count) return;
      auto memory = self.make();
      for (; i < self.count; i = self.next++) self.task(i, memory);
    }
  } shared{make, task, count, {0}};
  parallel_for(0, std::min(threads, count), 1, Shared::run, &shared);
}

// Calls task(begin, end) for parts of [0, count) that have `part` elements or fewer.
template <class Task>
void for_each_part(ParallelFor parallel_for, int64_t count, int64_t part, const Task& task) {
  struct Shared {
    const Task& task;
    int64_t count, part;
    static void run(int64_t begin, int64_t end, void* context) {
      const auto& self = *static_cast<const Shared*>(context);
      for (int64_t i = begin; i < end; i++)
        self.task(i * self.part, std::min(self.count, (i + 1) * self.part));
    }
  } shared{task, count, part};
  parallel_for(0, (count + part - 1) / part, 1, Shared::run, &shared);
}

inline float sum_of_lanes(Floats x) {
  float lanes[PANEL];
  store(lanes, x);
  for (int width = PANEL / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Rows and panels of columns whose sums fit the registers. QUERY_BLOCK, KEY_BLOCK: of attention, a
// multiple of SUM_ROWS and of PANEL.
#if defined(__AVX512VNNI__)
constexpr int SUM_ROWS = 12, SUM_PANELS = 2;
#else
constexpr int SUM_ROWS = 6, SUM_PANELS = 1;
#endif
constexpr int64_t QUERY_BLOCK = 96, KEY_BLOCK = 96;

// A matrix as the left factor: element (m, k) at m * row + k * step. As the right one: sixteen
// columns of panel n and row k at n * row + k * step.
struct Factor {
  const float* at;
  int64_t row, step;
};

template <int N>
inline void multiply_sums(Factor a, Factor b, int64_t depth, float* c, int64_t c_row, bool adds) {
  Floats sum[SUM_ROWS][N];
#pragma GCC unroll 16
  for (int m = 0; m < SUM_ROWS; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sum[m][n] = adds ? load(c + m * c_row + n * PANEL) : splat(0);
  }
  for (int64_t k = 0; k < depth; k++, a.at += a.step, b.at += b.step) {
    Floats some[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) some[n] = load(b.at + n * b.row);
#pragma GCC unroll 16
    for (int m = 0; m < SUM_ROWS; m++) {
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[m][n] = fma(some[n], splat(a.at[m * a.row]), sum[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < SUM_ROWS; m++) {
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) store(c + m * c_row + n * PANEL, sum[m][n]);
  }
}

// c[SUM_ROWS][panels * 16] = a b, or that is added.
inline void multiply_rows(Factor a, Factor b, int64_t panels, int64_t depth, float* c,
                          int64_t c_row, bool adds) {
  int64_t n = 0;
  for (; n + SUM_PANELS <= panels; n += SUM_PANELS)
    multiply_sums<SUM_PANELS>(a, {b.at + n * b.row, b.row, b.step}, depth, c + n * PANEL, c_row,
                              adds);
  for (; n < panels; n++)
    multiply_sums<1>(a, {b.at + n * b.row, b.row, b.step}, depth, c + n * PANEL, c_row, adds);
}

struct PackedSequence {  // filled in by the caller as 64-bit words
  int64_t first, length;
};

// Causal attention of packed sequences: q [tokens][heads][d], k and v [tokens][kv heads][d] and
// out as q; normalizers [heads][tokens], the logarithms of the sums of e ** score.
struct PackedAttention {
  const float *q, *k, *v;
  float *out, *normalizers;
  const PackedSequence* sequences;
  int64_t sequence_count, tokens, heads, kv_heads, d;
  // of the gradient; dk and dv have a row for each head
  const float* dout = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;

  int64_t width() const { return round_up(d); }
  float scale() const { return float(1 / std::sqrt(double(d))); }

  // A head of a sequence, padded with zeros to blocks and to panels.
  struct Memory {
    int64_t d, width, rows;
    AlignedArray<float> q, k, v, keys, values, dout, dq, dk, dv, tile, gradient_tile, deltas;

    Memory(const PackedAttention& of, bool gradient) : d(of.d), width(of.width()) {
      int64_t longest = 0;
      for (int64_t s = 0; s < of.sequence_count; s++)
        longest = std::max(longest, of.sequences[s].length);
      rows = padded(longest);
      q = aligned_array<float>(rows * width), v = aligned_array<float>(rows * width);
      keys = aligned_array<float>(rows * d);
      tile = aligned_array<float>(QUERY_BLOCK * KEY_BLOCK);
      dq = aligned_array<float>(gradient ? rows * width : QUERY_BLOCK * width);
      if (!gradient) return;
      k = aligned_array<float>(rows * width), dout = aligned_array<float>(rows * width);
      values = aligned_array<float>(rows * d);
      dk = aligned_array<float>(KEY_BLOCK * width), dv = aligned_array<float>(KEY_BLOCK * width);
      gradient_tile = aligned_array<float>(QUERY_BLOCK * KEY_BLOCK);
      deltas = aligned_array<float>(rows);
    }
    static int64_t padded(int64_t length) {
      constexpr int64_t block = std::max(QUERY_BLOCK, KEY_BLOCK);
      return (length + block - 1) / block * block;
    }
    // Rows of a head, `stride` apart, times `factor`.
    void copy(float* to, const float* from, int64_t stride, int64_t length, float factor) const {
      for (int64_t t = 0; t < length; t++, from += stride, to += width) {
        int64_t i = 0;
        for (; i + PANEL <= d; i += PANEL) store(to + i, mul(load(from + i), splat(factor)));
        for (; i < d; i++) to[i] = from[i] * factor;
        for (; i < width; i++) to[i] = 0;
      }
      std::fill(to, to + (padded(length) - length) * width, 0.0f);
    }
    // Copied rows as panels of sixteen columns [rows / 16][d][16].
    void transpose(float* to, const float* from, int64_t length) const {
      for (int64_t t = 0; t < padded(length); t += PANEL, from += PANEL * width, to += PANEL * d) {
        for (int64_t i = 0; i < d; i++)
          for (int64_t lane = 0; lane < PANEL; lane++)
            to[i * PANEL + lane] = from[lane * width + i];
      }
    }
  };

  // Columns of a block of keys from `begin` on that any of SUM_ROWS queries from `query` on sees:
  // none, or each of them sees one.
  static int64_t visible_to_rows(int64_t query, int64_t begin) {
    return std::min<int64_t>(KEY_BLOCK, query + SUM_ROWS - begin);
  }

  void forward(int64_t task, Memory& memory) const {
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    const auto [first, length] = sequences[task / heads];
    const int64_t head = task % heads, kv_head = head / (heads / kv_heads), w = memory.width;
    const int64_t stride = heads * d, kv_stride = kv_heads * d;
    float* const keys_by_rows = memory.v.get();  // until the values take their place
    memory.copy(keys_by_rows, k + first * kv_stride + kv_head * d, kv_stride, length, 1);
    memory.transpose(memory.keys.get(), keys_by_rows, length);
    memory.copy(memory.q.get(), q + first * stride + head * d, stride, length, scale());
    memory.copy(memory.v.get(), v + first * kv_stride + kv_head * d, kv_stride, length, 1);
    float* const sums = memory.dq.get();
    float maxima[QUERY_BLOCK], totals[QUERY_BLOCK];
    for (int64_t query = 0; query < length; query += QUERY_BLOCK) {
      const int64_t rows = std::min(QUERY_BLOCK, length - query);
      std::fill_n(maxima, QUERY_BLOCK, -INFINITE), std::fill_n(totals, QUERY_BLOCK, 0.0f);
      std::fill_n(sums, QUERY_BLOCK * w, 0.0f);
      for (int64_t begin = 0; begin < query + rows; begin += KEY_BLOCK) {
        for (int64_t r = 0; r < rows; r += SUM_ROWS) {
          const int64_t visible = visible_to_rows(query + r, begin);
          if (visible <= 0) continue;
          float* const scores = memory.tile.get();
          multiply_rows({&memory.q[(query + r) * w], w, 1},
                        {&memory.keys[begin * d], PANEL * d, PANEL}, round_up(visible) / PANEL, d,
                        scores, KEY_BLOCK, false);
          for (int64_t m = 0; m < SUM_ROWS; m++) {
            const int64_t seen = std::min<int64_t>(KEY_BLOCK, query + r + m + 1 - begin);
            float* const row = scores + m * KEY_BLOCK;
            std::fill(row + seen, row + round_up(visible), -INFINITE);
            Floats highest = splat(maxima[r + m]);
            for (int64_t t = 0; t < seen; t += PANEL) highest = maximum(highest, load(row + t));
            const float next = largest(highest);
            Floats total = splat(0);
            for (int64_t t = 0; t < seen; t += PANEL) {
              store(row + t, exponential(add(load(row + t), splat(-next))));
              if (t + PANEL > seen) std::fill(row + seen, row + t + PANEL, 0.0f);
              total = add(total, load(row + t));
            }
            std::fill(row + round_up(seen), row + round_up(visible), 0.0f);
            const float decay = std::exp(maxima[r + m] - next);
            totals[r + m] = totals[r + m] * decay + sum_of_lanes(total);
            maxima[r + m] = next;
            if (decay != 1)
              for (float* to = sums + (r + m) * w; to < sums + (r + m + 1) * w; to += PANEL)
                store(to, mul(load(to), splat(decay)));
          }
          multiply_rows({scores, KEY_BLOCK, 1}, {&memory.v[begin * w], PANEL, w}, w / PANEL,
                        visible, sums + r * w, w, true);
        }
      }
      for (int64_t m = 0; m < rows; m++) {
        float* const to = out + (first + query + m) * stride + head * d;
        for (int64_t i = 0; i < d; i++) to[i] = sums[m * w + i] / totals[m];
        normalizers[head * tokens + first + query + m] = maxima[m] + std::log(totals[m]);
      }
    }
  }

  // Dao 2023 (arXiv 2307.08691), algorithm 2.
  void backward(int64_t task, Memory& memory) const {
    const auto [first, length] = sequences[task / heads];
    const int64_t head = task % heads, kv_head = head / (heads / kv_heads), w = memory.width;
    const int64_t stride = heads * d, kv_stride = kv_heads * d;
    const float* const normalizer = normalizers + head * tokens + first;
    memory.copy(memory.q.get(), q + first * stride + head * d, stride, length, scale());
    memory.copy(memory.k.get(), k + first * kv_stride + kv_head * d, kv_stride, length, 1);
    memory.transpose(memory.keys.get(), memory.k.get(), length);
    memory.copy(memory.v.get(), v + first * kv_stride + kv_head * d, kv_stride, length, 1);
    memory.transpose(memory.values.get(), memory.v.get(), length);
    memory.copy(memory.dout.get(), out + first * stride + head * d, stride, length, 1);
    for (int64_t t = 0; t < length; t++) {
      const float *x = &memory.dout[t * w], *y = dout + (first + t) * stride + head * d;
      float sum = 0;
      for (int64_t i = 0; i < d; i++) sum += x[i] * y[i];
      memory.deltas[t] = sum;
    }
    memory.copy(memory.dout.get(), dout + first * stride + head * d, stride, length, 1);
    std::fill_n(memory.dq.get(), Memory::padded(length) * w, 0.0f);
    float *const weights = memory.tile.get(), *const gradients = memory.gradient_tile.get();
    for (int64_t begin = 0; begin < length; begin += KEY_BLOCK) {
      const int64_t columns = std::min(KEY_BLOCK, length - begin);
      for (int64_t query = begin / QUERY_BLOCK * QUERY_BLOCK; query < length;
           query += QUERY_BLOCK) {
        const int64_t rows = std::min(QUERY_BLOCK, length - query);
        for (int64_t r = 0; r < rows; r += SUM_ROWS) {
          const int64_t visible = visible_to_rows(query + r, begin);
          if (visible <= 0) continue;
          score_gradients(query + r, begin, visible, normalizer, length, memory,
                          weights + r * KEY_BLOCK, gradients + r * KEY_BLOCK);
          multiply_rows({gradients + r * KEY_BLOCK, KEY_BLOCK, 1},
                        {&memory.k[begin * w], PANEL, w}, w / PANEL, visible,
                        &memory.dq[(query + r) * w], w, true);
        }
        const bool adds = query > begin;
        for (int64_t n = 0; n < columns; n += SUM_ROWS) {
          const int64_t m = std::max<int64_t>(0, begin + n - query);  // the first that sees it
          const Factor queries{&memory.q[(query + m) * w], PANEL, w},
              outputs{&memory.dout[(query + m) * w], PANEL, w};
          multiply_rows({gradients + m * KEY_BLOCK + n, 1, KEY_BLOCK}, queries, w / PANEL,
                        std::max<int64_t>(0, rows - m), &memory.dk[n * w], w, adds);
          multiply_rows({weights + m * KEY_BLOCK + n, 1, KEY_BLOCK}, outputs, w / PANEL,
                        std::max<int64_t>(0, rows - m), &memory.dv[n * w], w, adds);
        }
      }
      for (int64_t n = 0; n < columns; n++) {
        const int64_t at = (first + begin + n) * stride + head * d;
        std::copy_n(&memory.dk[n * w], d, dk + at);
        std::copy_n(&memory.dv[n * w], d, dv + at);
      }
    }
    for (int64_t t = 0; t < length; t++) {
      float* const to = dq + (first + t) * stride + head * d;
      for (int64_t i = 0; i < d; i++) to[i] = memory.dq[t * w + i] * scale();
    }
  }

  // Attention weights of SUM_ROWS queries, and the gradients of their scores; both are zero where
  // a query sees nothing.
  void score_gradients(int64_t query, int64_t begin, int64_t visible, const float* normalizer,
                       int64_t length, const Memory& memory, float* weights,
                       float* gradients) const {
    const int64_t w = memory.width, panels = round_up(visible) / PANEL;
    multiply_rows({&memory.q[query * w], w, 1}, {&memory.keys[begin * d], PANEL * d, PANEL}, panels,
                  d, weights, KEY_BLOCK, false);
    multiply_rows({&memory.dout[query * w], w, 1}, {&memory.values[begin * d], PANEL * d, PANEL},
                  panels, d, gradients, KEY_BLOCK, false);
    for (int64_t m = 0; m < SUM_ROWS; m++) {
      const int64_t seen =
          query + m < length ? std::min<int64_t>(KEY_BLOCK, query + m + 1 - begin) : 0;
      float *const p = weights + m * KEY_BLOCK, *const ds = gradients + m * KEY_BLOCK;
      if (seen) {
        const Floats below = splat(-normalizer[query + m]), delta = splat(-memory.deltas[query + m]);
        for (int64_t t = 0; t < seen; t += PANEL) {
          // rounding may make the exponent a little larger than zero
          const Floats weight = exponential(add(load(p + t), below));
          store(p + t, weight);
          store(ds + t, mul(weight, add(load(ds + t), delta)));
        }
      }
      std::fill(p + seen, p + panels * PANEL, 0.0f);
      std::fill(ds + seen, ds + panels * PANEL, 0.0f);
    }
  }

  void run_forward(ParallelFor parallel_for, int64_t threads) const {
    for_each_task(
        parallel_for, threads, sequence_count * heads, [&] { return Memory(*this, false); },
        [&](int64_t task, Memory& memory) { forward(task, memory); });
  }
  void run_backward(ParallelFor parallel_for, int64_t threads) const {
    for_each_task(
        parallel_for, threads, sequence_count * heads, [&] { return Memory(*this, true); },
        [&](int64_t task, Memory& memory) { backward(task, memory); });
  }
};

constexpr int64_t PART = 1 << 14;  // elements of a part of an elementwise operation
constexpr int64_t NORM_ROWS = 64;  // whose gradients of RMSNorm's weights are summed first

// y [rows][width] = x / sqrt(mean(x ** 2) + eps) * weight; width is a multiple of 16. inverses
// [rows]: 1 / sqrt.
inline void rms_norm(ParallelFor parallel_for, const float* x, const float* weight, float eps,
                     float* y, float* inverses, int64_t rows, int64_t width) {
  for_each_part(parallel_for, rows, NORM_ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* from = x + row * width;
      Floats sum = splat(0);
      for (int64_t i = 0; i < width; i += PANEL) sum = fma(load(from + i), load(from + i), sum);
      const float inverse = 1 / std::sqrt(sum_of_lanes(sum) / width + eps);
      inverses[row] = inverse;
      for (int64_t i = 0; i < width; i += PANEL)
        store(y + row * width + i, mul(mul(load(from + i), splat(inverse)), load(weight + i)));
    }
  });
}

// dx, and dweight [rows / NORM_ROWS, rounded up][width], to be summed.
inline void rms_norm_backward(ParallelFor parallel_for, const float* x, const float* weight,
                              const float* inverses, const float* dy, float* dx, float* dweight,
                              int64_t rows, int64_t width) {
  for_each_part(parallel_for, rows, NORM_ROWS, [&](int64_t begin, int64_t end) {
    float* const gradient = dweight + begin / NORM_ROWS * width;
    std::fill_n(gradient, width, 0.0f);
    for (int64_t row = begin; row < end; row++) {
      const float *from = x + row * width, *above = dy + row * width;
      const Floats inverse = splat(inverses[row]);
      Floats sum = splat(0);
      for (int64_t i = 0; i < width; i += PANEL) {
        const Floats normed = mul(load(from + i), inverse);
        sum = fma(mul(load(above + i), load(weight + i)), normed, sum);
        store(gradient + i, fma(load(above + i), normed, load(gradient + i)));
      }
      const Floats mean = splat(-sum_of_lanes(sum) / width);
      for (int64_t i = 0; i < width; i += PANEL) {
        const Floats normed = mul(load(from + i), inverse);
        store(dx + row * width + i,
              mul(inverse, fma(normed, mean, mul(load(above + i), load(weight + i)))));
      }
    }
  });
}

// y [tokens][heads][d]: the two halves of each head of x, rotated against each other by the angles
// of cosines and sines [tokens][d], backwards with sign -1; d is a multiple of 32.
inline void rotate(ParallelFor parallel_for, const float* x, const float* cosines,
                   const float* sines, float sign, float* y, int64_t tokens, int64_t heads,
                   int64_t d) {
  const int64_t half = d / 2, rows = std::max<int64_t>(1, PART / (heads * d));
  for_each_part(parallel_for, tokens, rows, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      for (int64_t at = token * heads * d; at < (token + 1) * heads * d; at += d) {
        for (int64_t i = 0; i < half; i += PANEL) {
          const Floats cosine = load(cosines + token * d + i),
                       sine = mul(load(sines + token * d + i), splat(sign)),
                       a = load(x + at + i), b = load(x + at + half + i);
          store(y + at + i, add(mul(a, cosine), mul(mul(b, splat(-1)), sine)));
          store(y + at + half + i, add(mul(b, cosine), mul(a, sine)));
        }
      }
    }
  });
}

// y = gate / (1 + e ** -gate) * up; T is float or bfloat16; count is a multiple of 16.
template <class T>
void swiglu(ParallelFor parallel_for, const void* gates, const void* ups, void* out,
            int64_t count) {
  const T *gate = static_cast<const T*>(gates), *up = static_cast<const T*>(ups);
  T* const y = static_cast<T*>(out);
  for_each_part(parallel_for, count, PART, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += PANEL) {
      const Floats x = load(gate + i);
      store(y + i, mul(mul(x, sigmoid(x)), load(up + i)));
    }
  });
}

template <class T>
void swiglu_backward(ParallelFor parallel_for, const void* gates, const void* ups,
                     const void* above, void* gate_gradient, void* up_gradient, int64_t count) {
  const T *gate = static_cast<const T*>(gates), *up = static_cast<const T*>(ups),
          *dy = static_cast<const T*>(above);
  T *const dgate = static_cast<T*>(gate_gradient), *const dup = static_cast<T*>(up_gradient);
  for_each_part(parallel_for, count, PART, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += PANEL) {
      const Floats x = load(gate + i), s = sigmoid(x), y = load(dy + i), swish = mul(x, s);
      // d swish = s + swish (1 - s)
      const Floats slope = fma(swish, add(splat(1), mul(s, splat(-1))), s);
      store(dup + i, mul(y, swish));
      store(dgate + i, mul(mul(y, load(up + i)), slope));
    }
  });
}

}  // namespace
