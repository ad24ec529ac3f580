// Images in vectors, scratch memory and threads of the kernels in native_*.cc.
//
// Arrays are float32, or bfloat16 in memory only.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "native_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kImages = kLanes;  // Of a vector, where it holds the same number of several images.

// `count` numbers of each of 16 images, `stride` apart, to vectors of 16 images.
template <class T>
void gather(const T* from, int64_t stride, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Lanes lanes = first_lanes(count - c);
    Vector v[kLanes];
    for (int64_t image = 0; image < kImages; ++image) v[image] = load(from + image * stride + c, lanes);
    transpose(v);
    for (int64_t i = 0; i < std::min(kLanes, count - c); ++i) store(to + (c + i) * kImages, v[i]);
  }
}

template <class T>
void scatter(const float* from, int64_t count, T* to, int64_t stride) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Lanes lanes = first_lanes(count - c);
    Vector v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      v[i] = i < count - c ? load(from + (c + i) * kImages) : zero();
    transpose(v);
    for (int64_t image = 0; image < kImages; ++image) store(to + image * stride + c, v[image], lanes);
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
