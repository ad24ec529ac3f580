// The forward pass in inference on CPUs with AVX2 or AVX-512, called by native_inference.py, which says what each
// computes.
//
// A vector holds the same number of 16 images. So no lane is lost to channels that fill no vector, a convolution does
// not compute with the zeros around an image, and pooling needs no shuffles. Images are rearranged when they enter a
// kernel and when they leave it, 16 x 16 numbers at a time.
//
// Each number is computed in the same way by any number of threads.

#include "native.h"

namespace {

constexpr int kPixels = 4;       // Of a register tile, side by side.
constexpr int64_t kDepth = 96;   // Channels of a panel: its activations and weights fit the first cache.
using Element = PARANET_ELEMENT;

// out[i][J + j] += sum over k of a[i * pixel + k * step ...] b[k * ldb + J + j], LO <= i < HI, j < N, all in registers.
template <int LO, int HI, int J, int N, int P, int K>
__attribute__((always_inline)) inline void product_tile(const float* a, int64_t pixel, int64_t step, const float* b,
                                                        int64_t ldb, int64_t depth, Vector (&out)[P][K]) {
  Vector sums[P][N];
#pragma GCC unroll 4
  for (int i = LO; i < HI; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < N; ++j) sums[i][j] = out[i][J + j];
  for (int64_t k = 0; k < depth; ++k, a += step, b += ldb) {
    Vector left[P];
#pragma GCC unroll 4
    for (int i = LO; i < HI; ++i) left[i] = load(a + i * pixel);
#pragma GCC unroll 12
    for (int j = 0; j < N; ++j) {
      Vector right = all(b[J + j]);
#pragma GCC unroll 4
      for (int i = LO; i < HI; ++i) sums[i][j] = fmadd(left[i], right, sums[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = LO; i < HI; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < N; ++j) out[i][J + j] = sums[i][j];
}

// The same of all of out, a tile of registers after another.
template <int LO, int HI, int J = 0, int P, int K>
__attribute__((always_inline)) inline void product(const float* a, int64_t pixel, int64_t step, const float* b,
                                                   int64_t ldb, int64_t depth, Vector (&out)[P][K]) {
  constexpr int kTogether = std::min(K, kRegisters), kEnd = std::min(HI, LO + kRegisters / kTogether);
  static_assert(K % kTogether == 0);
  if constexpr (kEnd < HI) {
    product<LO, kEnd, J>(a, pixel, step, b, ldb, depth, out);
    product<kEnd, HI, J>(a, pixel, step, b, ldb, depth, out);
  } else {
    product_tile<LO, HI, J, kTogether>(a, pixel, step, b, ldb, depth, out);
    if constexpr (J + kTogether < K) product<LO, HI, J + kTogether>(a, pixel, step, b, ldb, depth, out);
  }
}

using Layer = InferenceLayer;

// A block's sizes. Features are [H W, total channels, 16 images], z is [H W, bottleneck width, 16 images].
struct Block {
  int64_t height, width, total, bottleneck, growth, padded;
};

// z = relu(relu(scale x + shift) kernel + shift2) of a row of pixels.
template <int K>
void bottleneck_row(const Block& block, const Layer& layer, int64_t row, const float* features, float* z) {
  float* panel = scratch(0, kDepth * kPixels * kImages);
  for (int64_t p = row * block.width; p < (row + 1) * block.width; p += kPixels) {
    float* to = z + p * block.bottleneck * kImages;
    for (int64_t first = 0; first < layer.channels; first += kDepth) {
      int64_t depth = std::min(kDepth, layer.channels - first);
      const float* x = features + (p * block.total + first) * kImages;
      for (int64_t c = 0; c < depth; ++c) {
        Vector scale = all(layer.scale[first + c]), shift = all(layer.shift[first + c]);
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) {
          Vector a = fmadd(load(x + (i * block.total + c) * kImages), scale, shift);
          store(panel + (c * kPixels + i) * kImages, relu(a));
        }
      }
      for (int64_t n = 0; n < block.bottleneck; n += K) {
        Vector out[kPixels][K];
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < K; ++j)
            out[i][j] = first ? load(to + (i * block.bottleneck + n + j) * kImages)
                              : all(layer.shift2[n + j]);
        product<0, kPixels>(panel, kImages, kPixels * kImages, layer.kernel + first * block.bottleneck + n,
                            block.bottleneck, depth, out);
        if (first + depth == layer.channels)
#pragma GCC unroll 4
          for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < K; ++j) out[i][j] = relu(out[i][j]);
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < K; ++j) store(to + (i * block.bottleneck + n + j) * kImages, out[i][j]);
      }
    }
  }
}

// The layer's new channels of a row of pixels, by a kernel [3, 3, bottleneck width, padded].
template <int K>
void convolve_row(const Block& block, const Layer& layer, int64_t row, const float* z, const float* kernel,
                  float* features) {
  int64_t pixel = block.bottleneck * kImages;
  for (int64_t p = 0; p < block.width; p += kPixels)
    for (int64_t n = 0; n < block.growth; n += K) {
      Vector out[kPixels][K];
#pragma GCC unroll 4
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) out[i][j] = zero();
      for (int64_t dr = -1; dr <= 1; ++dr) {
        if (row + dr < 0 || row + dr >= block.height) continue;
        const float* from = z + ((row + dr) * block.width + p) * pixel;
        const float* weights = kernel + (dr + 1) * 3 * block.bottleneck * block.padded + n;
        int64_t tap = block.bottleneck * block.padded;
        if (p == 0) {
          product<1, kPixels>(from - pixel, pixel, kImages, weights, block.padded, block.bottleneck, out);
        } else {
          product<0, kPixels>(from - pixel, pixel, kImages, weights, block.padded, block.bottleneck, out);
        }
        product<0, kPixels>(from, pixel, kImages, weights + tap, block.padded, block.bottleneck, out);
        if (p + kPixels == block.width) {
          product<0, kPixels - 1>(from + pixel, pixel, kImages, weights + 2 * tap, block.padded, block.bottleneck, out);
        } else {
          product<0, kPixels>(from + pixel, pixel, kImages, weights + 2 * tap, block.padded, block.bottleneck, out);
        }
      }
      float* to = features + ((row * block.width + p) * block.total + layer.channels + n) * kImages;
#pragma GCC unroll 4
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j)
          if (n + j < block.growth) store(to + (i * block.total + j) * kImages, out[i][j]);
    }
}

template <class T, int W, int K>
void dense_block(ffi::ThreadPool& pool, const Block& block, const T* x, int64_t batch, int64_t channels,
                 const std::vector<Layer>& layers, T* out) {
  int64_t groups = batch / kImages, pixels = block.height * block.width;
  int64_t size = pixels * block.total * kImages, z_size = pixels * block.bottleneck * kImages;
  int64_t taps = 9 * block.bottleneck, padded = taps * block.padded;
  float* kernels = scratch(1, int64_t(layers.size()) * padded);
  for (size_t i = 0; i < layers.size(); ++i)
    for (int64_t tap = 0; tap < taps; ++tap) {
      float* to = kernels + int64_t(i) * padded + tap * block.padded;
      std::memset(to, 0, block.padded * 4);
      std::memcpy(to, layers[i].kernel2 + tap * block.growth, block.growth * 4);
    }
  auto enter = [&](int64_t group, int64_t row, float* features, float*) {
    for (int64_t p = row * block.width; p < (row + 1) * block.width; ++p)
      gather(x + (group * kImages * pixels + p) * channels, pixels * channels, channels,
             features + p * block.total * kImages);
  };
  auto bottleneck = [&](int64_t layer, int64_t row, const float* features, float* z) {
    bottleneck_row<W>(block, layers[layer], row, features, z);
  };
  auto convolve = [&](int64_t layer, int64_t row, float* features, const float* z) {
    convolve_row<K>(block, layers[layer], row, z, kernels + layer * padded, features);
  };
  auto leave = [&](int64_t group, int64_t row, const float* features) {
    for (int64_t p = row * block.width; p < (row + 1) * block.width; ++p)
      scatter(features + p * block.total * kImages, block.total,
              out + (group * kImages * pixels + p) * block.total, pixels * block.total);
  };
  each_row(pool, groups, block.height, layers.size(), size, z_size, enter, bottleneck, convolve, leave, [] {});
}

// The largest of a window's 3x3 convolutions: 2^halvings x 2^halvings pixels, P of them side by side at once.
template <class T, int P, int K>
void entry(ffi::ThreadPool& pool, const T* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
           const float* kernel, int64_t features, int64_t window, T* out) {
  int64_t groups = batch / kImages, out_height = height / window, out_width = width / window;
  int64_t together = std::max<int64_t>(1, 8 / window);  // Rows of the result that share the rows of images they read.
  int64_t bands = (out_height + together - 1) / together;
  int64_t row_size = (width + 2) * channels * kImages, row_channels = 3 * channels;
  parallel(pool, groups * bands, [&](int64_t task) {
    int64_t group = task / bands, first = task % bands * together, last = std::min(first + together, out_height);
    float* image = scratch(0, (together * window + 2) * row_size);  // With zeros around it.
    float* largest = scratch(1, features * kImages);
    for (int64_t row = first * window - 1; row <= last * window; ++row) {
      float* to = image + (row - first * window + 1) * row_size;
      if (row < 0 || row >= height) {
        std::memset(to, 0, row_size * 4);
        continue;
      }
      std::memset(to, 0, channels * kImages * 4);
      std::memset(to + row_size - channels * kImages, 0, channels * kImages * 4);
      gather(x + (group * kImages * height + row) * width * channels, height * width * channels, width * channels,
             to + channels * kImages);
    }
    for (int64_t row = first; row < last; ++row)
      for (int64_t column = 0; column < out_width; ++column) {
        for (int64_t n = 0; n < features; n += K) {
          Vector most[K];
#pragma GCC unroll 12
          for (int j = 0; j < K; ++j) most[j] = all(-INFINITY);
          for (int64_t r = (row - first) * window; r < (row - first + 1) * window; ++r)
            for (int64_t c = column * window; c < (column + 1) * window; c += P) {
              Vector values[P][K];
#pragma GCC unroll 4
              for (int i = 0; i < P; ++i)
#pragma GCC unroll 12
                for (int j = 0; j < K; ++j) values[i][j] = zero();
              for (int64_t dr = 0; dr < 3; ++dr)
                product<0, P>(image + (r + dr) * row_size + c * channels * kImages, channels * kImages, kImages,
                              kernel + dr * row_channels * features + n, features, row_channels, values);
#pragma GCC unroll 4
              for (int i = 0; i < P; ++i)
#pragma GCC unroll 12
                for (int j = 0; j < K; ++j) most[j] = larger(most[j], values[i][j]);
            }
#pragma GCC unroll 12
          for (int j = 0; j < K; ++j) store(largest + (n + j) * kImages, most[j]);
        }
        scatter(largest, features, out + ((group * kImages * out_height + row) * out_width + column) * features,
                out_height * out_width * features);
      }
  });
}

// Means of relu(scale x + shift) over windows of rows x columns pixels.
template <class T, class U>
void pooled(ffi::ThreadPool& pool, const T* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
            const float* scale, const float* shift, int64_t rows, int64_t columns, U* out) {
  int64_t out_height = height / rows, out_width = width / columns;
  Vector share = all(1.f / float(rows * columns));
  parallel(pool, batch * out_height, [&](int64_t task) {
    const T* from = x + task * rows * width * channels;
    U* to = out + task * out_width * channels;
    for (int64_t column = 0; column < out_width; ++column, from += columns * channels, to += channels)
      for (int64_t c = 0; c < channels; c += kLanes) {
        Lanes lanes = first_lanes(channels - c);
        Vector factor = load(scale + c, lanes), add = load(shift + c, lanes), sum = zero();
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) {
            Vector value = fmadd(load(from + (i * width + j) * channels + c, lanes), factor, add);
            sum = sum + relu(value);
          }
        store(to + c, sum * share, lanes);
      }
  });
}

ffi::Error DenseBlock(ffi::ThreadPool pool, In x, ffi::RemainingArgs parameters, Out out) {
  auto in = x.dimensions();
  std::vector<Layer> layers = layers_of(parameters);
  int64_t bottleneck = layers[0].bottleneck, growth = layers[0].growth;
  int64_t padded = growth % 6 ? round_up(growth, 4) : growth;
  Block block{in[1], in[2], int64_t(out->dimensions()[3]), bottleneck, growth, padded};
  auto run = [&](auto function) { function(pool, block, as<Element>(x), in[0], in[3], layers, as<Element>(out)); };
  if (bottleneck % 6) {
    growth % 6 ? run(dense_block<Element, 4, 4>) : run(dense_block<Element, 4, 6>);
  } else {
    growth % 6 ? run(dense_block<Element, 6, 4>) : run(dense_block<Element, 6, 6>);
  }
  return ffi::Error::Success();
}

ffi::Error Entry(ffi::ThreadPool pool, In x, In kernel, Out out) {
  auto in = x.dimensions(), to = out->dimensions();
  int64_t window = in[1] / to[1];
  auto run = [&](auto function) {
    function(pool, as<Element>(x), in[0], in[1], in[2], in[3], floats(kernel), to[3], window, as<Element>(out));
  };
  if (to[3] % 12 == 0) {
    window % 4 ? run(entry<Element, 2, 12>) : run(entry<Element, 4, 6>);
  } else {
    window % 4 ? run(entry<Element, 2, 4>) : run(entry<Element, 4, 4>);
  }
  return ffi::Error::Success();
}

template <class U>
ffi::Error Pooled(ffi::ThreadPool pool, In x, In scale, In shift, Out out, int64_t rows, int64_t columns) {
  auto in = x.dimensions();
  pooled(pool, as<Element>(x), in[0], in[1], in[2], in[3], floats(scale), floats(shift), rows, columns, as<U>(out));
  return ffi::Error::Success();
}

}  // namespace

#define WINDOW .Attr<int64_t>("rows").Attr<int64_t>("columns")

XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_dense_block, DenseBlock, BIND ARG.RemainingArgs() RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_entry, Entry, BIND ARG ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_pooled, Pooled<Element>, BIND ARG ARG ARG RET WINDOW);
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_averaged, Pooled<float>, BIND ARG ARG ARG RET WINDOW);
