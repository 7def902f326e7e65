// All layers of a decoder or a vision tower in one call, and the C interface. It includes nothing
// of PyTorch; the threads are PyTorch's own, passed in as its torch_parallel_for.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "simd.h"
#include "training.h"

namespace {

// The threads of one call. They share each phase of work, with a barrier after it.
class ThreadTeam {
 public:
  ThreadTeam(int64_t size, int64_t phases) : size(size), claimed(new std::atomic<int64_t>[phases]) {
    for (int64_t i = 0; i < phases; i++) claimed[i] = 0;
  }

  // A thread; it counts for `weight` threads where PyTorch's pool has fewer than requested.
  class Member {
   public:
    Member(ThreadTeam& team, int64_t weight) : team(team), weight(weight) {}

    // Calls task(i) once for each i below `count`, on any thread. Threads claim ranges, smaller
    // ones towards the end for balance; returns when all are done.
    template <class F>
    void for_each(int64_t count, F&& task) {
      std::atomic<int64_t>& claimed = team.claimed[phase++];
      for (int64_t i = claimed; i < count; i = claimed) {
        const int64_t end = i + std::max<int64_t>(1, (count - i) / (2 * team.size));
        if (claimed.compare_exchange_weak(i, end)) {
          for (; i < end; i++) task(i);
        }
      }
      team.arrived += weight;
      for (int64_t turn = 0; team.arrived < team.size * phase; turn++)
        turn < SPIN_LIMIT ? spin_pause() : std::this_thread::yield();
    }

   private:
    // some hundred microseconds: then the other thread has lost its CPU
    static constexpr int64_t SPIN_LIMIT = 10000;
    ThreadTeam& team;
    const int64_t weight;
    int64_t phase = 0;
  };

 private:
  const int64_t size;
  std::unique_ptr<std::atomic<int64_t>[]> claimed;  // how far each phase is claimed
  std::atomic<int64_t> arrived{0};
};

struct LayerWeights {  // filled in by the caller as 64-bit words, like the structs below
  const uint16_t *before_attention, *before_mlp;
  Weight q, k, v, o, gate, up, down;
};
struct LayerKV {  // KV cache of a sequence in one layer
  void *keys, *values;
  uint16_t *key_scales, *value_scales;
};
struct Sequence {
  int64_t first, count, at, capacity;  // its rows in the batch, and their positions in its KV cache
  int64_t outputs;                     // hidden states of the last `outputs` tokens are returned
  const LayerKV* kv;                   // by layer
};
struct Shape {
  int64_t layers, width, inner, heads, kv_heads, d;
};
struct TowerWeights {
  const uint16_t *norm, *norm_bias, *mlp_norm, *mlp_norm_bias;
  Weight q, k, v, o, fc1, fc2;
};

// Hidden states in float32 from the first layer to the last, and the operations on them that
// decoder and tower share.
struct HiddenStates {
  int64_t tokens;
  const int64_t width;
  AlignedArray<float> x;  // [tokens][width]
  Inputs normed;

  HiddenStates(int64_t tokens, int64_t width, const uint16_t* hidden)
      : tokens(tokens),
        width(width),
        x(aligned_array<float>(tokens * width)),
        normed(tokens, groups_of(width)) {
    for (int64_t i = 0; i < tokens * width; i += PANEL) store(&x[i], load(hidden + i));
  }
  void write(uint16_t* hidden) const {
    for (int64_t i = 0; i < tokens * width; i += PANEL) store(hidden + i, load(&x[i]));
  }

  // Layer norm, quantized into `normed`; without a bias RMS norm.
  void norm(int64_t token, const uint16_t* weight, const uint16_t* bias, float eps,
            Workspace& workspace) {
    const float* row = &x[token * width];
    const Floats mean = splat(bias ? -total(row, [](Floats y) { return y; }) / width : 0);
    const float squares = total(row, [&](Floats y) { return mul(add(y, mean), add(y, mean)); });
    const Floats factor = splat(1 / std::sqrt(squares / width + eps));
    for (int64_t i = 0; i < width; i += PANEL) {
      const Floats y = mul(mul(add(load(row + i), mean), factor), load(weight + i));
      store(&workspace.row[i], bias ? add(y, load(bias + i)) : y);
    }
    normed.quantize_row(token, workspace.row.get(), width);
  }
  template <class F>
  float total(const float* row, F&& of) const {
    Floats sum = splat(0);
    for (int64_t i = 0; i < width; i += PANEL) sum = add(of(load(row + i)), sum);
    float parts[PANEL], all = 0;
    store(parts, sum);
    for (float part : parts) all += part;
    return all;
  }

  // Calls sink(token, 16 outputs of the panel) for the tokens of some tiles.
  template <class F>
  static void multiply(const Weight& w, int64_t number, const Inputs& inputs, TileRange tiles,
                       Workspace& workspace, F&& sink) {
    const Floats bias = w.bias ? load(w.bias + number * PANEL) : splat(0);
    const Panel panel = workspace.unpack_buffer.panel(w, number, inputs, tiles);
    float rows[TILE * PANEL];
    for (int64_t tile = tiles.first; tile < tiles.last; tile++) {
      product(panel, inputs, tile, rows);
      for (int64_t m = 0; m < inputs.size(tile); m++)
        sink(inputs.first(tile) + m, add(load(rows + m * PANEL), bias));
    }
  }

  // Calls sink(token, outputs of panel i of a, outputs of panel j of b).
  template <class F>
  static void multiply(const Weight& a, int64_t i, const Weight& b, int64_t j, const Inputs& inputs,
                       TileRange tiles, Workspace& workspace, F&& sink) {
    const Floats a_bias = a.bias ? load(a.bias + i * PANEL) : splat(0),
                 b_bias = b.bias ? load(b.bias + j * PANEL) : splat(0);
    const Panel one = workspace.unpack_buffer.panel(a, i, inputs, tiles),
                other = workspace.unpack_buffer.panel(b, j, inputs, tiles, 1);
    float ones[TILE * PANEL], others[TILE * PANEL];
    for (int64_t tile = tiles.first; tile < tiles.last; tile++) {
      product(one, inputs, tile, ones);
      product(other, inputs, tile, others);
      for (int64_t m = 0; m < inputs.size(tile); m++) {
        sink(inputs.first(tile) + m, add(load(ones + m * PANEL), a_bias),
             add(load(others + m * PANEL), b_bias));
      }
    }
  }

  // Calls task(panel, tiles) for all panels and blocks of tiles.
  template <class F>
  static void for_each_panel(ThreadTeam::Member& team, const Inputs& inputs, int64_t panels,
                             F&& task) {
    team.for_each(inputs.blocks() * panels,
                  [&](int64_t number) { task(number % panels, inputs.block(number / panels)); });
  }

  // x += product, for all tokens.
  void add_product(ThreadTeam::Member& team, const Weight& w, const Inputs& inputs,
                   Workspace& workspace) {
    for_each_panel(team, inputs, width / PANEL, [&](int64_t panel, TileRange tiles) {
      multiply(w, panel, inputs, tiles, workspace, [&](int64_t token, Floats y) {
        float* to = &x[token * width + panel * PANEL];
        store(to, add(y, load(to)));
      });
    });
  }
};

// All layers of a Qwen2 decoder for the new tokens of some sequences. q, k, v and attention weights
// are bfloat16, all other activations float32.
struct Decoder : Shape {
  const LayerWeights* weights;
  int64_t tokens;
  const float eps;
  std::vector<Sequence> sequences;
  const uint16_t *cosines, *sines;  // [tokens][d]
  std::vector<int64_t> tasks;       // attention tasks before each sequence
  int64_t outputs = 0;
  ThreadTeam team;
  HiddenStates hidden;
  Inputs attention_inputs, mlp_inputs;
  AlignedArray<uint16_t> qkv;                     // [tokens][heads of q, k and v][d], after RoPE
  AlignedArray<float> attention_out, mlp_hidden;  // [tokens][heads][d], [tokens][inner]

  Decoder(const Shape& shape, int64_t threads, const LayerWeights* weights, int64_t tokens,
          float eps, const Sequence* sequences, int64_t sequence_count, const uint16_t* cosines,
          const uint16_t* sines, const uint16_t* x)
      : Shape(shape),
        weights(weights),
        tokens(tokens),
        eps(eps),
        sequences(sequences, sequences + sequence_count),
        cosines(cosines),
        sines(sines),
        team(threads, 10 * layers + 1),
        hidden(tokens, width, x),
        attention_inputs(tokens, groups_of(heads * d)),
        mlp_inputs(tokens, groups_of(inner)),
        qkv(aligned_array<uint16_t>(tokens * stride())),
        attention_out(aligned_array<float>(tokens * heads * d)),
        mlp_hidden(aligned_array<float>(tokens * inner)) {
    for (const Sequence& s : this->sequences) outputs += s.outputs;
    count_tasks();
  }

  void count_tasks() {
    tasks.assign(1, 0);
    for (const Sequence& s : sequences)
      tasks.push_back(tasks.back() + kv_heads * queries(s, 0).tiles());
  }

  // Keeps the rows whose hidden states are returned. The last layer needs only keys and values of
  // the others.
  void keep_output_rows() {
    tokens = 0;
    for (Sequence& s : sequences) {
      const int64_t from = s.first + s.count - s.outputs;
      std::memmove(&hidden.x[tokens * width], &hidden.x[from * width],
                   s.outputs * width * sizeof(float));
      std::memmove(&qkv[tokens * stride()], &qkv[from * stride()],
                   s.outputs * stride() * sizeof(uint16_t));
      s = {tokens, s.outputs, s.at + s.count - s.outputs, s.capacity, s.outputs, s.kv};
      tokens += s.outputs;
    }
    hidden.tokens = tokens;
    for (Inputs* inputs : {&hidden.normed, &attention_inputs, &mlp_inputs}) inputs->resize(tokens);
    count_tasks();
  }

  static void run(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Decoder*>(context);
    ThreadTeam::Member member(self.team, end - begin);
    const int64_t groups =
        std::max({self.hidden.normed.groups, self.attention_inputs.groups, self.mlp_inputs.groups});
    const TileRegisters registers;
    Workspace workspace(AttentionScratch(self.d, self.d), self.width, groups);
    const bool drops_rows = self.outputs < self.tokens;
    for (int64_t layer = 0; layer < self.layers; layer++)
      self.run_layer(member, layer, drops_rows && layer + 1 == self.layers, workspace);
  }

  void run_layer(ThreadTeam::Member& team, int64_t layer, bool drops_rows, Workspace& workspace) {
    const LayerWeights& w = weights[layer];
    const Inputs& normed = hidden.normed;
    team.for_each(tokens, [&](int64_t token) {
      hidden.norm(token, w.before_attention, nullptr, eps, workspace);
    });
    HiddenStates::for_each_panel(
        team, normed, (heads + 2 * kv_heads) * d / PANEL / 2,
        [&](int64_t number, TileRange tiles) { project(w, number, tiles, workspace); });
    team.for_each(sequences.size() * kv_heads, [&](int64_t task) {
      const Sequence& s = sequences[task / kv_heads];
      s.kv[layer].key_scales ? append_kv<int8_t>(s, layer, task % kv_heads)
                             : append_kv<uint16_t>(s, layer, task % kv_heads);
    });
    if (drops_rows) team.for_each(1, [&](int64_t) { keep_output_rows(); });
    team.for_each(tasks.back(), [&](int64_t task) {
      const int64_t i = std::upper_bound(tasks.begin(), tasks.end(), task) - tasks.begin() - 1;
      const bool scaled = sequences[i].kv[layer].key_scales;
      const int64_t part = task - tasks[i];
      scaled ? attend<int8_t>(i, layer, part, workspace.attention)
             : attend<uint16_t>(i, layer, part, workspace.attention);
    });
    team.for_each(tokens, [&](int64_t token) {
      attention_inputs.quantize_row(token, &attention_out[token * heads * d], heads * d);
    });
    hidden.add_product(team, w.o, attention_inputs, workspace);
    team.for_each(
        tokens, [&](int64_t token) { hidden.norm(token, w.before_mlp, nullptr, eps, workspace); });
    HiddenStates::for_each_panel(team, normed, inner / PANEL, [&](int64_t panel, TileRange tiles) {
      gate(w, panel, tiles, workspace);
    });
    team.for_each(tokens, [&](int64_t token) {
      mlp_inputs.quantize_row(token, &mlp_hidden[token * inner], inner);
    });
    hidden.add_product(team, w.down, mlp_inputs, workspace);
  }

  template <class S>
  KVHead<S> head(const Sequence& s, int64_t layer, int64_t number) const {
    const LayerKV& m = s.kv[layer];
    const int64_t part = number * s.capacity;
    return {static_cast<S*>(m.keys) + part * d,
            static_cast<S*>(m.values) + part * d,
            m.key_scales,
            m.value_scales,
            part,
            d,
            s.capacity,
            d};
  }

  int64_t stride() const { return (heads + 2 * kv_heads) * d; }

  // q, k and v of one panel in the first half of a head and its counterpart in the second; RoPE
  // rotates the two against each other.
  void project(const LayerWeights& w, int64_t number, TileRange tiles, Workspace& workspace) {
    const int64_t half = d / PANEL / 2, head = number / half, at = number % half * PANEL;
    const Weight& part = head < heads ? w.q : head < heads + kv_heads ? w.k : w.v;
    const int64_t first = head < heads ? 0 : head < heads + kv_heads ? heads : heads + kv_heads;
    const int64_t panel = (head - first) * 2 * half + number % half;
    const bool rotated = head < heads + kv_heads;
    HiddenStates::multiply(
        part, panel, part, panel + half, hidden.normed, tiles, workspace,
        [&](int64_t token, Floats a, Floats b) {
          uint16_t* to = &qkv[token * stride() + head * d + at];
          const uint16_t *cosine = cosines + token * d + at, *sine = sines + token * d + at;
          store(to, rotated ? fma(a, load(cosine), mul(mul(b, splat(-1)), load(sine))) : a);
          store(to + d / 2, rotated ? fma(b, load(cosine + d / 2), mul(a, load(sine + d / 2))) : b);
        });
  }

  template <class S>
  void append_kv(const Sequence& s, int64_t layer, int64_t number) {
    const uint16_t* key = &qkv[s.first * stride() + (heads + number) * d];
    head<S>(s, layer, number).append(s.at, s.count, key, key + kv_heads * d, stride());
  }

  Queries queries(const Sequence& s, int64_t number) const {
    const int64_t group = heads / kv_heads;
    return {
        &qkv[s.first * stride() + number * group * d], s.count, stride(), group, s.at + 1, true};
  }

  template <class S>
  void attend(int64_t i, int64_t layer, int64_t task, AttentionScratch& scratch) {
    const Sequence& s = sequences[i];
    const int64_t tiles = (tasks[i + 1] - tasks[i]) / kv_heads, number = task / tiles,
                  group = heads / kv_heads;
    queries(s, number).attend(
        task % tiles, head<S>(s, layer, number), scratch,
        [&](int64_t token, int64_t h, const float* x) {
          std::memcpy(&attention_out[((s.first + token) * heads + number * group + h) * d], x,
                      d * sizeof(float));
        });
  }

  // silu(gate) * up
  void gate(const LayerWeights& w, int64_t number, TileRange tiles, Workspace& workspace) {
    HiddenStates::multiply(w.gate, number, w.up, number, hidden.normed, tiles, workspace,
                           [&](int64_t token, Floats gate, Floats up) {
                             store(&mlp_hidden[token * inner + number * PANEL],
                                   mul(mul(gate, sigmoid(gate)), up));
                           });
  }
};

// All layers of a SigLIP tower for one crop, with full attention; types as in the decoder.
struct Tower : Shape {
  const TowerWeights* weights;
  const int64_t tokens, places, padded;  // tokens and head width, padded to whole panels
  const float eps;
  ThreadTeam team;
  HiddenStates hidden;
  Inputs attention_inputs, mlp_inputs;
  AlignedArray<uint16_t> qkv;                     // [3][tokens][width]
  AlignedArray<uint16_t> keys, values;            // [heads][d][places], [heads][tokens][padded]
  AlignedArray<float> attention_out, mlp_hidden;  // [tokens][width], [tokens][inner]

  Tower(const Shape& shape, int64_t threads, const TowerWeights* weights, int64_t tokens, float eps,
        const uint16_t* x)
      : Shape(shape),
        weights(weights),
        tokens(tokens),
        places(round_up(tokens)),
        padded(round_up(d)),
        eps(eps),
        team(threads, 10 * layers),
        hidden(tokens, width, x),
        attention_inputs(tokens, groups_of(width)),
        mlp_inputs(tokens, groups_of(inner)),
        qkv(aligned_array<uint16_t>(3 * tokens * width)),
        keys(aligned_array<uint16_t>(heads * d * places)),
        values(aligned_array<uint16_t>(heads * tokens * padded)),
        attention_out(aligned_array<float>(tokens * width)),
        mlp_hidden(aligned_array<float>(tokens * inner)) {}

  static void run(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Tower*>(context);
    ThreadTeam::Member member(self.team, end - begin);
    const TileRegisters registers;
    Workspace workspace(AttentionScratch(self.d, self.padded), self.width,
                        std::max(self.attention_inputs.groups, self.mlp_inputs.groups));
    for (int64_t layer = 0; layer < self.layers; layer++)
      self.run_layer(member, self.weights[layer], workspace);
  }

  void run_layer(ThreadTeam::Member& team, const TowerWeights& w, Workspace& workspace) {
    const Inputs& normed = hidden.normed;
    const int64_t panels = width / PANEL;
    team.for_each(tokens,
                  [&](int64_t token) { hidden.norm(token, w.norm, w.norm_bias, eps, workspace); });
    HiddenStates::for_each_panel(team, normed, 3 * panels, [&](int64_t panel, TileRange tiles) {
      const Weight& part = panel < panels ? w.q : panel < 2 * panels ? w.k : w.v;
      uint16_t* to = &qkv[panel / panels * tokens * width + panel % panels * PANEL];
      HiddenStates::multiply(part, panel % panels, normed, tiles, workspace,
                             [&](int64_t token, Floats y) { store(to + token * width, y); });
    });
    team.for_each(heads, [&](int64_t number) {
      const uint16_t *k = &qkv[tokens * width + number * d], *v = k + tokens * width;
      head(number).append(0, tokens, k, v, width);
    });
    const int64_t tiles = queries(0).tiles();
    team.for_each(heads * tiles, [&](int64_t task) {
      const int64_t number = task / tiles;
      queries(number).attend(task % tiles, head(number), workspace.attention,
                             [&](int64_t token, int64_t, const float* x) {
                               std::memcpy(&attention_out[token * width + number * d], x,
                                           d * sizeof(float));
                             });
    });
    team.for_each(tokens, [&](int64_t token) {
      attention_inputs.quantize_row(token, &attention_out[token * width], width);
    });
    hidden.add_product(team, w.o, attention_inputs, workspace);
    team.for_each(tokens, [&](int64_t token) {
      hidden.norm(token, w.mlp_norm, w.mlp_norm_bias, eps, workspace);
    });
    HiddenStates::for_each_panel(
        team, normed, inner / PANEL, [&](int64_t panel, TileRange tiles) {  // gelu by tanh
          HiddenStates::multiply(
              w.fc1, panel, normed, tiles, workspace,
              [&](int64_t token, Floats x) {  // x * (1 + tanh(y)) / 2 = x / (1 + e ** -2y)
                const Floats y = mul(fma(mul(x, x), splat(0.044715f), splat(1)),
                                     mul(x, splat(1.5957691216f)));  // 2 sqrt(2 / pi)
                store(&mlp_hidden[token * inner + panel * PANEL], mul(x, sigmoid(y)));
              });
        });
    team.for_each(tokens, [&](int64_t token) {
      mlp_inputs.quantize_row(token, &mlp_hidden[token * inner], inner);
    });
    hidden.add_product(team, w.fc2, mlp_inputs, workspace);
  }

  KVHead<uint16_t> head(int64_t number) const {
    return {&keys[number * d * places],
            &values[number * tokens * padded],
            nullptr,
            nullptr,
            0,
            d,
            places,
            padded};
  }
  Queries queries(int64_t number) const {
    return {&qkv[number * d], tokens, width, 1, tokens, false};
  }
};

// Threads of `llava_parallel_for` for the calls of this thread.
thread_local int64_t own_threads = 1;

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT void llava_set_threads(int64_t count) { own_threads = count; }

// As torch_parallel_for, on threads of this call: where PyTorch does not export its pool.
EXPORT int32_t llava_parallel_for(int64_t begin, int64_t end, int64_t grain, Body body,
                                  void* context) {
  const int64_t size = std::max(grain, (end - begin + own_threads - 1) / own_threads);
  std::vector<std::thread> threads;
  for (; end - begin > size; begin += size)
    threads.emplace_back(body, begin, begin + size, context);
  if (begin < end) body(begin, end, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// y [tokens, out] = x [tokens, in] by the packed weight, plus the bias unless it is null; x, bias
// and y are float32 or bfloat16.
EXPORT void llava_linear(ParallelFor parallel_for, int32_t bits, int32_t bfloat16, const void* x,
                         const uint8_t* weight, const uint16_t* scale, const void* bias, void* y,
                         int64_t tokens, int64_t in, int64_t out) {
  (bfloat16 ? linear<uint16_t> : linear<float>)(parallel_for, bits, x, weight, scale, bias, y,
                                                tokens, in, out);
}

// Writes k and v of some tokens to the positions from `at` on of a KV cache; out = causal attention
// of their queries. d is a multiple of 16. The KV cache is bfloat16 without scales, int8 with them.
EXPORT void llava_attend(ParallelFor parallel_for, const uint16_t* q, const uint16_t* k,
                         const uint16_t* v, void* keys, void* values, uint16_t* key_scales,
                         uint16_t* value_scales, uint16_t* out, int64_t tokens, int64_t heads,
                         int64_t kv_heads, int64_t d, int64_t capacity, int64_t at) {
  (key_scales ? attend<int8_t> : attend<uint16_t>)(parallel_for, q, k, v, keys, values, key_scales,
                                                   value_scales, out, tokens, heads, kv_heads, d,
                                                   capacity, at);
}

// All layers of a decoder over hidden states [tokens, width] in bfloat16, in place; the rows of the
// outputs move to the front. Only q, k and v have biases, or none has; width and inner are
// multiples of 16, d of 32.
EXPORT void llava_decode(ParallelFor parallel_for, int64_t threads, const Shape* shape,
                         const LayerWeights* weights, float eps, const Sequence* sequences,
                         int64_t sequence_count, const uint16_t* cosines, const uint16_t* sines,
                         uint16_t* hidden, int64_t tokens) {
  Decoder self(*shape, threads, weights, tokens, eps, sequences, sequence_count, cosines, sines,
               hidden);
  parallel_for(0, threads, 1, Decoder::run, &self);
  self.hidden.write(hidden);
}

// All layers of a tower over the hidden states [tokens, width] of a crop in bfloat16, in place.
// There are as many KV heads as heads; width and inner are multiples of 16, d of 2.
EXPORT void llava_encode(ParallelFor parallel_for, int64_t threads, const Shape* shape,
                         const TowerWeights* weights, float eps, uint16_t* hidden, int64_t tokens) {
  Tower self(*shape, threads, weights, tokens, eps, hidden);
  parallel_for(0, threads, 1, Tower::run, &self);
  self.hidden.write(hidden);
}

// Causal attention of packed sequences in float32; `normalizers` [heads][tokens] are for the
// gradient. Any d.
EXPORT void llava_packed_attention(ParallelFor parallel_for, int64_t threads, const float* q,
                                   const float* k, const float* v, float* out, float* normalizers,
                                   const PackedSequence* sequences, int64_t sequence_count,
                                   int64_t tokens, int64_t heads, int64_t kv_heads, int64_t d) {
  const PackedAttention self{q,         k,      v,     out,      normalizers, sequences,
                             sequence_count, tokens, heads, kv_heads, d};
  self.run_forward(parallel_for, threads);
}

// Its gradients; dk and dv are [tokens][heads][d], to be summed over the heads of a KV head.
EXPORT void llava_packed_attention_backward(
    ParallelFor parallel_for, int64_t threads, const float* q, const float* k, const float* v,
    float* out, float* normalizers, const float* dout, float* dq, float* dk, float* dv,
    const PackedSequence* sequences, int64_t sequence_count, int64_t tokens, int64_t heads,
    int64_t kv_heads, int64_t d) {
  const PackedAttention self{q,      k,     v,        out, normalizers, sequences, sequence_count,
                             tokens, heads, kv_heads, d,   dout,        dq,        dk,
                             dv};
  self.run_backward(parallel_for, threads);
}

EXPORT void llava_rms_norm(ParallelFor parallel_for, const float* x, const float* weight, float eps,
                           float* y, float* inverses, int64_t rows, int64_t width) {
  rms_norm(parallel_for, x, weight, eps, y, inverses, rows, width);
}

EXPORT void llava_rms_norm_backward(ParallelFor parallel_for, const float* x, const float* weight,
                                    const float* inverses, const float* dy, float* dx,
                                    float* dweight, int64_t rows, int64_t width) {
  rms_norm_backward(parallel_for, x, weight, inverses, dy, dx, dweight, rows, width);
}

EXPORT void llava_rotate(ParallelFor parallel_for, const float* x, const float* cosines,
                         const float* sines, float sign, float* y, int64_t tokens, int64_t heads,
                         int64_t d) {
  rotate(parallel_for, x, cosines, sines, sign, y, tokens, heads, d);
}

EXPORT void llava_swiglu(ParallelFor parallel_for, int32_t bfloat16, const void* gate,
                         const void* up, void* y, int64_t count) {
  (bfloat16 ? swiglu<uint16_t> : swiglu<float>)(parallel_for, gate, up, y, count);
}

EXPORT void llava_swiglu_backward(ParallelFor parallel_for, int32_t bfloat16, const void* gate,
                                  const void* up, const void* dy, void* dgate, void* dup,
                                  int64_t count) {
  (bfloat16 ? swiglu_backward<uint16_t> : swiglu_backward<float>)(parallel_for, gate, up, dy, dgate,
                                                                  dup, count);
}
