// Vectors of 16 floats, scratch memory and threads of the kernels in native_*.cc.
//
// Arrays are float32, or bfloat16 in memory only.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Vector = __m512;
using Mask = __mmask16;
constexpr int64_t kLanes = 16;
constexpr int64_t kImages = kLanes;  // Of a vector, where it holds the same number of several images.

struct BFloat16 {
  uint16_t bits;
};

Mask first_lanes(int64_t n) { return n >= kLanes ? Mask(0xffff) : Mask((1u << std::max<int64_t>(n, 0)) - 1); }

Vector load(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
Vector load(const float* from) { return _mm512_loadu_ps(from); }
Vector load(const BFloat16* from, Mask mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
Vector load(const BFloat16* from) { return load(from, Mask(0xffff)); }

void store(float* to, Vector v, Mask mask) { _mm512_mask_storeu_ps(to, mask, v); }
void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
void store(BFloat16* to, Vector v, Mask mask) {  // Rounds to nearest, ties to even.
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
void store(BFloat16* to, Vector v) { store(to, v, Mask(0xffff)); }

// A NaN stays one: where an operand is NaN, the second is taken.
Vector relu(Vector v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

void add_to(float* to, Vector v) { store(to, _mm512_add_ps(load(to), v)); }

// 16 x 16 numbers: row i, lane j to row j, lane i.
void transpose(Vector (&v)[kLanes]) {
  Vector t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// `count` numbers of each of 16 images, `stride` apart, to vectors of 16 images.
template <class T>
void gather(const T* from, int64_t stride, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Mask mask = first_lanes(count - c);
    Vector v[kLanes];
    for (int64_t image = 0; image < kImages; ++image) v[image] = load(from + image * stride + c, mask);
    transpose(v);
    for (int64_t i = 0; i < std::min(kLanes, count - c); ++i) store(to + (c + i) * kImages, v[i]);
  }
}

template <class T>
void scatter(const float* from, int64_t count, T* to, int64_t stride) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Mask mask = first_lanes(count - c);
    Vector v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      v[i] = i < count - c ? load(from + (c + i) * kImages) : _mm512_setzero_ps();
    transpose(v);
    for (int64_t image = 0; image < kImages; ++image) store(to + image * stride + c, v[image], mask);
  }
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A thread's scratch memory, one array per use, kept between calls.
float* scratch(int use, int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> arrays[8];
  static thread_local int64_t sizes[8] = {};
  if (sizes[use] < floats) {
    arrays[use].reset(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64))));
    sizes[use] = floats;
  }
  return arrays[use].get();
}

struct Floats {  // 64-byte aligned, not initialized.
  explicit Floats(int64_t size) : data(static_cast<float*>(std::aligned_alloc(64, round_up(size * 4 + 1, 64)))) {}
  ~Floats() { std::free(data); }
  Floats(const Floats&) = delete;
  float* const data;
};

// Runs task(phase, 0) ... task(phase, n - 1) for each phase on XLA's threads and this one; a phase begins when the one
// before has ended. A thread waits only for tasks that another has begun, so a pool that is busy with other callers
// cannot block it.
template <class Task>
void parallel(ffi::ThreadPool& pool, int64_t phases, int64_t n, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n, total;
    const Task* task;
    void wait(int64_t tasks) {
      for (int spin = 0; done.load() < tasks; ++spin) spin < 2000 ? _mm_pause() : std::this_thread::yield();
    }
    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < total;) {
        wait(i / n * n);
        (*task)(i / n, i % n);
        done.fetch_add(1);
      }
    }
  };
  auto state = std::make_shared<State>();
  state->n = n;
  state->total = phases * n;
  state->task = &task;
  int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  state->wait(state->total);
}

template <class Task>
void parallel(ffi::ThreadPool& pool, int64_t n, const Task& task) {
  parallel(pool, 1, n, [&](int64_t, int64_t i) { task(i); });
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

const float* floats(const In& buffer) { return static_cast<const float*>(buffer.untyped_data()); }
float* floats(Out& buffer) { return static_cast<float*>(buffer->untyped_data()); }
template <class T>
T* as(const In& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}
template <class T>
T* as(Out& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

// A layer of a dense block in inference, and how many channels it reads, has between its products, and adds.
struct InferenceLayer {
  const float *scale, *shift, *kernel, *shift2, *kernel2;
  int64_t channels, bottleneck, growth;
};

// From the five parameters of each layer, in order.
std::vector<InferenceLayer> layers_of(const ffi::RemainingArgs& parameters) {
  std::vector<InferenceLayer> layers;
  for (size_t i = 0; i + 4 < parameters.size(); i += 5) {
    auto at = [&](size_t j) { return *parameters.get<ffi::AnyBuffer>(i + j); };
    layers.push_back({floats(at(0)), floats(at(1)), floats(at(2)), floats(at(3)), floats(at(4)), at(0).dimensions()[0],
                      at(4).dimensions()[2], at(4).dimensions()[3]});
  }
  return layers;
}

// Takes groups of 16 images through a dense block. A thread takes a group through all layers, each row of pixels behind
// its bottleneck; where there are more threads than groups, all of them share the rows.
//
// enter(group, row, features, z), bottleneck(layer, row, features, z), convolve(layer, row, features, z) and leave(group,
// row, features) each do a row, and rest() follows what a thread has computed. The sizes are those of a group, in floats.
template <class Enter, class Bottleneck, class Convolve, class Leave, class Rest>
void each_row(ffi::ThreadPool& pool, int64_t groups, int64_t height, int64_t layers, int64_t size, int64_t z_size,
              const Enter& enter, const Bottleneck& bottleneck, const Convolve& convolve, const Leave& leave,
              const Rest& rest) {
  if (groups >= pool.num_threads()) {
    parallel(pool, groups, [&](int64_t group) {
      float *features = scratch(2, size), *z = scratch(3, z_size);
      for (int64_t row = 0; row < height; ++row) enter(group, row, features, z);
      for (int64_t layer = 0; layer < layers; ++layer)
        for (int64_t row = 0; row <= height; ++row) {
          if (row < height) bottleneck(layer, row, features, z);
          if (row) convolve(layer, row - 1, features, z);
        }
      rest();
      for (int64_t row = 0; row < height; ++row) leave(group, row, features);
    });
    return;
  }
  float *features = scratch(2, groups * size), *z = scratch(3, groups * z_size);
  int64_t last = 2 * layers + 1;
  parallel(pool, last + 1, groups * height, [&](int64_t phase, int64_t i) {
    int64_t group = i / height, row = i % height;
    float *own = features + group * size, *own_z = z + group * z_size;
    if (phase == 0) return enter(group, row, own, own_z);
    if (phase == last) return leave(group, row, own);
    phase % 2 ? bottleneck(phase / 2, row, own, own_z) : convolve(phase / 2 - 1, row, own, own_z);
    rest();
  });
}

}  // namespace

// What a handler takes from XLA: threads, arrays and results.
#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define ARG .Arg<ffi::AnyBuffer>()
#define RET .Ret<ffi::AnyBuffer>()
