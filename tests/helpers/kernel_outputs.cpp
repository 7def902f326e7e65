// Prints hashes of what the kernels compute on odd shapes: those that it is compiled with, or those
// of the library that is its argument.
#include <cstdio>

#include "layers.cpp"
#if defined(__x86_64__)
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
static auto* linear_function = &llava_linear;
static auto* decode_function = &llava_decode;
static auto* encode_function = &llava_encode;
static int32_t serial(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  for (int64_t i = begin; i < end; i++) body(i, i + 1, context);
  return 0;
}
static uint32_t state = 1;
static float random_float() {  // from -1 to 1
  state = state * 1664525 + 1013904223;
  return int32_t(state) / 2147483648.0f;
}
template <class T>
std::vector<T> random(int64_t n, float size = 1) {
  std::vector<T> x(n);
  for (T& y : x) {
    if constexpr (sizeof(T) == 1)
      y = T(int(random_float() * 128));
    else
      store_scalar(&y, random_float() * size);
  }
  return x;
}
std::vector<uint16_t> halves(int64_t n) {  // 0.001 to 0.01
  std::vector<uint16_t> x(n);
  for (auto& y : x) y = to_half(0.0055f + 0.0045f * random_float());
  return x;
}
std::vector<uint8_t> packed(int bits, int64_t out, int64_t in) {
  const int64_t blocks = (out + 15) / 16 * groups_of(in);
  auto w = random<uint8_t>(blocks * group_bytes(bits));
  for (int64_t i = 0; bits == 4 && i < blocks; i++)  // q_uint4 times sub_scale stays in 8 bits
    for (int64_t j = 0; j < SUB_SCALE_BYTES; j++) w[i * group_bytes(4) + j] &= 0xf7;
  return w;
}
template <class T>
void show(const char* name, const std::vector<T>& x) {
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < x.size() * sizeof(T); i++)
    hash = (hash ^ reinterpret_cast<const uint8_t*>(x.data())[i]) * 1099511628211u;
  printf("%s %016llx\n", name, (unsigned long long)hash);
}
template <class T>
void product(int bits, int64_t tokens, int64_t in, int64_t out) {
  const int64_t groups = groups_of(in), panels = (out + 15) / 16;
  auto x = random<T>(tokens * in), bias = random<T>(out), y = random<T>(tokens * out);
  auto w = packed(bits, out, in);
  auto s = halves(panels * groups * 16);
  linear_function(serial, bits, sizeof(T) == 2, x.data(), w.data(), s.data(), bias.data(), y.data(),
                  tokens, in, out);
  printf("linear %d %d %d %d ", bits, int(tokens), int(in), int(out)), show("", y);
}
struct Made {
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<uint16_t>> words;
  Weight weight(int64_t bits, int64_t out, int64_t in, bool bias) {
    bytes.push_back(packed(bits, out, in));
    words.push_back(halves(out * groups_of(in))), words.push_back(random<uint16_t>(out));
    return {bits, bytes.back().data(), words[words.size() - 2].data(),
            bias ? words.back().data() : nullptr};
  }
  uint16_t* numbers(int64_t n) {
    words.push_back(random<uint16_t>(n));
    return words.back().data();
  }
};
void decode(int64_t bits, int64_t tokens, bool in_8_bits) {
  const Shape shape{2, 64, 96, 4, 2, 32};
  Made m;
  const auto layer = [&] {
    return LayerWeights{m.numbers(64),
                        m.numbers(64),
                        m.weight(bits, 128, 64, true),
                        m.weight(bits, 64, 64, true),
                        m.weight(bits, 64, 64, true),
                        m.weight(bits, 64, 128, false),
                        m.weight(bits, 96, 64, false),
                        m.weight(bits, 96, 64, false),
                        m.weight(bits, 64, 96, false)};
  };
  const LayerWeights layers[] = {layer(), layer()};
  const int64_t capacity = tokens + 3, size = 2 * 32 * capacity;
  LayerKV kv[2];
  std::vector<uint8_t> keys[2], values[2];
  std::vector<uint16_t> key_scales[2], value_scales[2];
  for (int i = 0; i < 2; i++) {
    keys[i].resize(2 * size), values[i].resize(2 * size);
    if (in_8_bits)
      keys[i] = random<uint8_t>(2 * size), values[i] = random<uint8_t>(2 * size);
    else
      std::memcpy(keys[i].data(), random<uint16_t>(size).data(), 2 * size),
          std::memcpy(values[i].data(), random<uint16_t>(size).data(), 2 * size);
    key_scales[i] = halves(2 * capacity), value_scales[i] = halves(2 * capacity);
    kv[i] = {keys[i].data(), values[i].data(), in_8_bits ? key_scales[i].data() : nullptr,
             in_8_bits ? value_scales[i].data() : nullptr};
  }
  const Sequence sequence{0, tokens, 3, capacity, tokens, kv};
  auto hidden = random<uint16_t>(tokens * 64), cosines = random<uint16_t>(tokens * 32),
       sines = random<uint16_t>(tokens * 32);
  decode_function(serial, 1, &shape, layers, 1e-6f, &sequence, 1, cosines.data(), sines.data(),
               hidden.data(), tokens);
  printf("decode %d %d %d ", int(bits), int(tokens), in_8_bits), show("", hidden),
      show("keys", keys[1]), show("values", values[1]);
}
void encode(int64_t bits, int64_t tokens) {
  const Shape shape{2, 96, 112, 4, 4, 24};
  Made m;
  const auto layer = [&] {
    return TowerWeights{m.numbers(96),
                        m.numbers(96),
                        m.numbers(96),
                        m.numbers(96),
                        m.weight(bits, 96, 96, true),
                        m.weight(bits, 96, 96, true),
                        m.weight(bits, 96, 96, true),
                        m.weight(bits, 96, 96, true),
                        m.weight(bits, 112, 96, true),
                        m.weight(bits, 96, 112, true)};
  };
  const TowerWeights layers[] = {layer(), layer()};
  auto hidden = random<uint16_t>(tokens * 96);
  encode_function(serial, 1, &shape, layers, 1e-6f, hidden.data(), tokens);
  printf("encode %d %d ", int(bits), int(tokens)), show("", hidden);
}
int main([[maybe_unused]] int count, [[maybe_unused]] char** words) {
#if defined(__x86_64__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // to use the tile registers of AMX
  if (count > 1) {
    void* library = dlopen(words[1], RTLD_NOW);
    if (!library) return puts(dlerror()), 1;
    linear_function = reinterpret_cast<decltype(linear_function)>(dlsym(library, "llava_linear"));
    decode_function = reinterpret_cast<decltype(decode_function)>(dlsym(library, "llava_decode"));
    encode_function = reinterpret_cast<decltype(encode_function)>(dlsym(library, "llava_encode"));
  }
#endif
  for (int bits : {4, 8})
    for (int64_t tokens : {1, 2, 3, 4, 5, 12, 40}) {
      for (int64_t in : {1, 127, 128, 300})
        for (int64_t out : {1, 16, 37})
          product<float>(bits, tokens, in, out), product<uint16_t>(bits, tokens, in, out);
      decode(bits, tokens, false), decode(bits, tokens, true), encode(bits, tokens);
    }
}
