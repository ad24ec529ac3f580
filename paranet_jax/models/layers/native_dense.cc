// Passes of a dense layer on CPUs with AVX2 or AVX-512, called by native_dense.py, which says what each computes.
//
// XLA's CPU compiler writes every activation to memory between two operations. Here the activation, its product and the
// statistics of the result are one pass, in tiles that stay in the caches. Products are added up in float32; arrays are
// float32, or bfloat16 in memory only.
//
// The work is cut by the shapes alone, and partial sums are added in order, so results do not depend on the number of
// threads or on which thread is faster.

#include "native.h"

namespace {

constexpr int64_t kRows = 64;    // Rows of a tile.
constexpr int64_t kDepth = 192;  // Channels of a panel: its weights and activations fit the first cache.
constexpr float kEpsilon = 1e-5f;

// Means over `rows` of the sums of the tasks, in their order.
void mean_of(const float* partial, int64_t tasks, int64_t width, int64_t rows, float* means) {
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < tasks; ++i) sum += partial[i * width + c];
    means[c] = float(sum / double(rows));
  }
}

void sum_of(ffi::ThreadPool& pool, const float* partial, int64_t tasks, int64_t stride, int64_t size, float* out) {
  constexpr int64_t kChunk = 4096;
  parallel(pool, (size + kChunk - 1) / kChunk, [&](int64_t chunk) {
    int64_t end = std::min(size, (chunk + 1) * kChunk);
    for (int64_t c = chunk * kChunk; c < end; c += kLanes) {
      Lanes lanes = first_lanes(end - c);
      Vector sum = load(partial + c, lanes);
      for (int64_t i = 1; i < tasks; ++i) sum = sum + load(partial + i * stride + c, lanes);
      store(out + c, sum, lanes);
    }
  });
}

// [rows, columns] -> [columns, stride]; stride is a multiple of the lanes, and the end of each row is zero.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t stride) {
  for (int64_t r = 0; r < stride; r += kLanes) {
    Lanes lanes = first_lanes(rows - r);
    for (int64_t c = 0; c < columns; ++c) store(to + c * stride + r, strided(from + r * columns + c, columns, lanes));
  }
}

// Mean and 1 / standard deviation of each channel, from the means of values and of squares.
struct Normalizer {
  Normalizer(const float* means, int64_t channels) : mean(channels), rstd(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = means[c];
      rstd[c] = 1 / std::sqrt(std::max(means[channels + c] - means[c] * means[c], 0.f) + kEpsilon);
    }
    mean.resize(channels + kLanes);
    rstd.resize(channels + kLanes);
  }
  std::vector<float> mean, rstd;
};

// out[i][v] += a[i * row] b[16 v ...], i < M, v < N; of the last v LAST lanes. END: b ends with them.
template <int64_t LAST, bool END, int M, int N>
__attribute__((always_inline)) inline void add_products(const float* a, int64_t row, const float* b,
                                                        Vector (&out)[M][N]) {
  Vector right[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) right[v] = v == N - 1 ? load_first<LAST, END>(b + v * kLanes) : load(b + v * kLanes);
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i) {
    Vector left = all(a[i * row]);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v)
      out[i][v] = v == N - 1 ? fmadd_first<LAST>(left, right[v], out[i][v]) : fmadd(left, right[v], out[i][v]);
  }
}

// out[i][v] += sum over k of a[i * row + k * column] b[k * ldb + 16 v ...].
template <int64_t LAST = kLanes, int M, int N>
__attribute__((always_inline)) inline void product(const float* a, int64_t row, int64_t column, const float* b,
                                                   int64_t ldb, int64_t depth, Vector (&out)[M][N]) {
  constexpr bool kPart = LAST < kLanes && !kFreeMasks;
  for (int64_t k = 0; k < depth - kPart; ++k) add_products<LAST, false>(a + k * column, row, b + k * ldb, out);
  if (kPart) add_products<LAST, true>(a + (depth - 1) * column, row, b + (depth - 1) * ldb, out);
}

template <int M, int N>
void clear(Vector (&out)[M][N]) {
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) out[i][v] = zero();
}

// The register tile of M rows that begin `stride` apart.
template <int M, int N>
__attribute__((always_inline)) inline void load_tile(const float* from, int64_t stride, Vector (&out)[M][N]) {
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) out[i][v] = load(from + i * stride + v * kLanes);
}

template <int M, int N>
__attribute__((always_inline)) inline void store_tile(float* to, int64_t stride, const Vector (&out)[M][N]) {
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(to + i * stride + v * kLanes, out[i][v]);
}

// Rows of a register tile of rows that are n vectors wide, and how many of these vectors it has.
constexpr int tile_rows(int n) { return kRegisters < 24 ? kRegisters : n >= 24 ? 1 : 24 / n; }
constexpr int tile_columns(int n) { return kRegisters < 24 ? 1 : n; }

// Rows of N vectors in panels of as many vectors as a register tile, each with all of the rows.
template <int N>
struct Panels {
  static constexpr int kColumns = tile_columns(N);
  static constexpr int64_t kWidth = kColumns * kLanes;
  static int64_t place(int64_t rows, int64_t row, int v) {
    return (v / kColumns * rows + row) * kWidth + v % kColumns * kLanes;
  }
};

// ---------------------------------------------------------------------------------------------------- bottleneck

// z of at most kRows rows into `tile`, which has room for 24 more.
template <class T, int N>
void bottleneck_tile(const T* x, int64_t count, int64_t stride, const float* scale, const float* shift,
                     int64_t channels, const float* kernel, float* tile) {
  constexpr int M = tile_rows(N);
  constexpr int64_t kWidth = N * kLanes;
  float* panel = scratch(0, M * kDepth);
  for (int64_t first = 0; first < channels; first += kDepth) {
    int64_t depth = std::min(kDepth, channels - first);
    for (int64_t r = 0; r < count; r += M) {
      int live = int(std::min<int64_t>(M, count - r));
      for (int i = 0; i < live; ++i) {
        const T* row = x + (r + i) * stride + first;
        for (int64_t c = 0; c < depth; c += kLanes) {
          Lanes lanes = first_lanes(depth - c);
          _mm_prefetch(reinterpret_cast<const char*>(row + kRows * stride + c), _MM_HINT_T1);
          Vector a = fmadd(load(row + c, lanes), load(scale + first + c, lanes), load(shift + first + c, lanes));
          store(panel + i * kDepth + c, relu(a));
        }
      }
      for (int v = 0; v < N; v += tile_columns(N)) {
        Vector out[M][tile_columns(N)];
        float* to = tile + r * kWidth + v * kLanes;
        if (first == 0) {
          clear(out);
        } else {
          load_tile(to, kWidth, out);
        }
        product(panel, kDepth, 1, kernel + first * kWidth + v * kLanes, kWidth, depth, out);
        store_tile(to, kWidth, out);
      }
    }
  }
}

template <class T, int N>
void bottleneck(ffi::ThreadPool pool, const T* x, int64_t rows, int64_t stride, const float* scale, const float* shift,
                int64_t channels, const float* kernel, T* z, float* means) {
  constexpr int M = tile_rows(N);
  constexpr int64_t kWidth = N * kLanes;
  int64_t tasks = (rows + kRows - 1) / kRows;
  Floats partial(tasks * 2 * kWidth);
  parallel(pool, tasks, [&](int64_t task) {
    int64_t begin = task * kRows, count = std::min(kRows, rows - begin);
    float* tile = scratch(1, (kRows + M) * kWidth);
    bottleneck_tile<T, N>(x + begin * stride, count, stride, scale, shift, channels, kernel, tile);
    Vector sums[2][N];
    clear(sums);
    for (int64_t r = 0; r < count; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        T* to = z + (begin + r) * kWidth + v * kLanes;
        Vector value = load(tile + r * kWidth + v * kLanes);
        store(to, value);
        sums[0][v] = sums[0][v] + value;
        sums[1][v] = fmadd(value, value, sums[1][v]);
      }
    }
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < N; ++v) store(partial.data + (task * 2 + i) * kWidth + v * kLanes, sums[i][v]);
  });
  mean_of(partial.data, tasks, 2 * kWidth, rows, means);
}

// --------------------------------------------------------------------------------------------- images with borders

// Several images below each other, flattened, with a zero row between two and a zero pixel before each row, so that the
// neighbors of a pixel are at constant distances.
struct Images {
  Images(int64_t batch, int64_t height, int64_t width, int64_t pixels = 256) : height(height), width(width) {
    together = std::max<int64_t>(1, std::min(batch, pixels / (height * width)));
    groups = (batch + together - 1) / together;
    row = width + 1;
    positions = (together * (height + 1) + 1) * row + 1;
    first = row + 1;
    end = positions - 1 - row;
  }
  int64_t place(int64_t image, int64_t r) const { return (image * (height + 1) + 1 + r) * row + 1; }
  int64_t height, width, together, groups, row, positions, first, end;
};

// h = relu(scale (z - mean) rstd + shift) of a group of images, with borders, in panels of `rows`.
template <class T, int N>
void activate(const Images& images, const T* z, int64_t count, const Normalizer& norm, const float* scale,
              const float* shift, int64_t rows, float* h) {
  constexpr int64_t kWidth = N * kLanes;
  std::memset(h, 0, rows * kWidth * 4);
  Vector mean[N], factor[N], add[N];
  for (int v = 0; v < N; ++v) {
    mean[v] = load(norm.mean.data() + v * kLanes);
    factor[v] = load(scale + v * kLanes) * load(norm.rstd.data() + v * kLanes);
    add[v] = load(shift + v * kLanes);
  }
  for (int64_t image = 0; image < count; ++image)
    for (int64_t r = 0; r < images.height; ++r) {
      int64_t to = images.place(image, r);
      for (int64_t c = 0; c < images.width; ++c, z += kWidth, ++to)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
          Vector value = fmadd(load(z + v * kLanes) - mean[v], factor[v], add[v]);
          store(h + Panels<N>::place(rows, to, v), relu(value));
        }
    }
}

// A layer's new channels, K, in vectors: how many, the lanes of the last one, and positions of a register tile.
template <int64_t K>
struct Growth {
  static constexpr int kVectors = (K + kLanes - 1) / kLanes;
  static constexpr int64_t kWidth = kVectors * kLanes, kLast = K - (kVectors - 1) * kLanes;
  static constexpr int kPositions = tile_rows(kVectors) * (kRegisters < 24 && K <= kLanes / 2 ? 2 : 1);
};

// The 3x3 convolution of h, images with borders in panels of `rows`, at so many positions, by a kernel [3, 3, W, K].
template <int N, int64_t K>
void convolve_positions(const Images& images, const float* h, int64_t rows, const float* kernel, int64_t first,
                        float* values) {
  using New = Growth<K>;
  constexpr int M = New::kPositions, C = tile_columns(New::kVectors);
  constexpr int64_t kPanel = Panels<N>::kWidth, kWidth = N * kLanes;
  for (int v = 0; v < New::kVectors; v += C) {
    Vector out[M][C];
    clear(out);
    for (int64_t panel = 0; panel < N * kLanes; panel += kPanel)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* from = h + (panel / kPanel * rows + first + (tap / 3 - 1) * images.row + tap % 3 - 1) * kPanel;
        const float* weights = kernel + (tap * kWidth + panel) * K + v * kLanes;
        if (C == New::kVectors || v + C == New::kVectors) {
          product<New::kLast>(from, kPanel, 1, weights, K, kPanel, out);
        } else {
          product(from, kPanel, 1, weights, K, kPanel, out);
        }
      }
    store_tile(values + v * kLanes, New::kWidth, out);
  }
}

template <class T, int N, int64_t K>
void convolve(ffi::ThreadPool pool, const T* z, const float* z_means, const float* scale, const float* shift,
              const float* kernel, int64_t batch, int64_t height, int64_t width, T* y, float* means) {
  using New = Growth<K>;
  constexpr int64_t kWidth = N * kLanes;
  Images images(batch, height, width);
  Normalizer norm(z_means, kWidth);
  Floats partial(images.groups * 2 * New::kWidth);
  int64_t rows = images.positions + New::kPositions;
  parallel(pool, images.groups, [&](int64_t group) {
    int64_t begin = group * images.together, count = std::min(images.together, batch - begin);
    float* h = scratch(0, rows * kWidth);
    float* values = scratch(1, rows * New::kWidth);
    const T* from = z + begin * height * width * kWidth;
    activate<T, N>(images, from, count, norm, scale, shift, rows, h);
    for (int64_t p = images.first; p < images.end; p += New::kPositions)
      convolve_positions<N, K>(images, h, rows, kernel, p, values + p * New::kWidth);
    Vector sums[2][New::kVectors];
    clear(sums);
    T* to = y + begin * height * width * K;
    for (int64_t image = 0; image < count; ++image)
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < width; ++c, to += K)
#pragma GCC unroll 8
          for (int v = 0; v < New::kVectors; ++v) {
            Vector value = load(values + (images.place(image, r) + c) * New::kWidth + v * kLanes);
            store(to + v * kLanes, value, first_lanes(K - v * kLanes));
            sums[0][v] = sums[0][v] + value;
            sums[1][v] = fmadd(value, value, sums[1][v]);
          }
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < New::kVectors; ++v)
        store(partial.data + (group * 2 + i) * K + v * kLanes, sums[i][v], first_lanes(K - v * kLanes));
  });
  mean_of(partial.data, images.groups, 2 * K, batch * height * width, means);
}

// ---------------------------------------------------------------------------------------------------- append

template <class T>
void append(ffi::ThreadPool pool, T* x, int64_t rows, int64_t stride, const T* y, const float* means, int64_t growth,
            int64_t offset) {
  Normalizer norm(means, growth);
  constexpr int64_t kChunk = 2048;
  parallel(pool, (rows + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t r = chunk * kChunk; r < std::min(rows, (chunk + 1) * kChunk); ++r)
      for (int64_t c = 0; c < growth; c += kLanes) {
        Lanes lanes = first_lanes(growth - c);
        Vector value = load(y + r * growth + c, lanes) - load(norm.mean.data() + c);
        store(x + r * stride + offset + c, value * load(norm.rstd.data() + c), lanes);
      }
  });
}

// ---------------------------------------------------------------------------------------------------- backward

// Means of g_y and of g_y y^.
template <class T>
void append_means(ffi::ThreadPool pool, const T* g, int64_t rows, int64_t stride, const T* x, int64_t x_stride,
                  int64_t growth, int64_t offset, float* means) {
  constexpr int64_t kChunk = 1024;
  int64_t tasks = (rows + kChunk - 1) / kChunk;
  Floats partial(tasks * 2 * growth);
  parallel(pool, tasks, [&](int64_t task) {
    for (int64_t c = 0; c < growth; c += kLanes) {
      Lanes lanes = first_lanes(growth - c);
      Vector sum = zero(), product = sum;
      for (int64_t r = task * kChunk; r < std::min(rows, (task + 1) * kChunk); ++r) {
        Vector value = load(g + r * stride + offset + c, lanes);
        sum = sum + value;
        product = fmadd(value, load(x + r * x_stride + offset + c, lanes), product);
      }
      store(partial.data + task * 2 * growth + c, sum, lanes);
      store(partial.data + (task * 2 + 1) * growth + c, product, lanes);
    }
  });
  mean_of(partial.data, tasks, 2 * growth, rows, means);
}

template <class T, int N, int64_t K>
void convolve_backward(ffi::ThreadPool pool, const T* g, int64_t stride, const T* x, int64_t x_stride, int64_t offset,
                       const float* g_means, const float* y_means, const T* z, const float* z_means, const float* scale,
                       const float* shift, const float* kernel, int64_t batch, int64_t height, int64_t width, T* u,
                       float* u_means, float* dkernel) {
  using New = Growth<K>;
  constexpr int M = tile_rows(N), C = tile_columns(N);
  constexpr int kOuts = kRegisters < 24 || N <= 4 ? 2 : 1;  // Channels of y at once, with 3 taps and C vectors of z.
  constexpr int64_t kWidth = N * kLanes, kPanel = C * kLanes, kOut = New::kWidth, kChunk = 64;
  Images images(batch, height, width);
  Normalizer norm(z_means, kWidth), y_norm(y_means, K);
  int64_t outs = round_up(K, kOuts), size = 9 * outs * kWidth, rows = images.positions + M;
  int64_t slices = std::min<int64_t>(images.groups, 16);
  Floats flipped(9 * K * kWidth), partial(slices * size), sums(slices * 2 * kWidth), total(size);
  for (int64_t c = 0; c < kWidth; c += kPanel)
    for (int64_t s = 0; s < 9; ++s)
      transpose(kernel + (s * kWidth + c) * K, kPanel, K, flipped.data + (c * 9 + s * kPanel) * K, kPanel);
  parallel(pool, slices, [&](int64_t slice) {
    float* h = scratch(0, rows * kWidth);
    float* dh = scratch(1, rows * kWidth);
    float* dy = scratch(2, rows * kOut);
    float* dw = partial.data + slice * size;
    std::memset(dw, 0, size * 4);
    Vector u_sums[2][N], mean[N], rstd[N];
    clear(u_sums);
    for (int v = 0; v < N; ++v) {
      mean[v] = load(norm.mean.data() + v * kLanes);
      rstd[v] = load(norm.rstd.data() + v * kLanes);
    }
    int64_t last = (slice + 1) * images.groups / slices;
    for (int64_t group = slice * images.groups / slices; group < last; ++group) {
      int64_t begin = group * images.together, count = std::min(images.together, batch - begin);
      int64_t pixel = begin * height * width;
      const T* from = z + pixel * kWidth;
      activate<T, N>(images, from, count, norm, scale, shift, rows, h);
      std::memset(dy, 0, rows * kOut * 4);
      for (int64_t image = 0, n = pixel; image < count; ++image)
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < width; ++c, ++n)
            for (int v = 0; v < New::kVectors; ++v) {
              int64_t o = v * kLanes;
              Lanes lanes = first_lanes(K - o);
              Vector value = load(g + n * stride + offset + o, lanes) - load(g_means + o, lanes);
              value = fnmadd(load(x + n * x_stride + offset + o, lanes), load(g_means + K + o, lanes), value);
              store(dy + (images.place(image, r) + c) * kOut + o, value * load(y_norm.rstd.data() + o));
            }
      for (int64_t p = images.first; p < images.end; p += M)
        for (int64_t c = 0; c < kWidth; c += kPanel) {
          Vector out[M][C];
          clear(out);
          for (int64_t tap = 0; tap < 9; ++tap)
            product(dy + (p - (tap / 3 - 1) * images.row - (tap % 3 - 1)) * kOut, kOut, 1,
                    flipped.data + (c * 9 + tap * kPanel) * K, kPanel, K, out);
          store_tile(dh + p * kWidth + c, kWidth, out);
        }
      T* to = u + pixel * kWidth;
      for (int64_t image = 0; image < count; ++image)
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < width; ++c, to += kWidth, from += kWidth) {
            int64_t p = images.place(image, r) + c;
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) {
              Mask on = positive(load(h + Panels<N>::place(rows, p, v)));
              Vector value = keep(on, load(dh + p * kWidth + v * kLanes));
              Vector z_hat = (load(from + v * kLanes) - mean[v]) * rstd[v];
              store(to + v * kLanes, value);
              u_sums[0][v] = u_sums[0][v] + value;
              u_sums[1][v] = fmadd(value, z_hat, u_sums[1][v]);
            }
          }
      // dkernel: in chunks of pixels, whose h and dy stay in the first cache, without the borders, where dy is zero.
      int64_t lines = std::max<int64_t>(1, kChunk / images.row), end = images.together * (height + 1);
      for (int64_t begin = 1; begin < end; begin += lines) {
        int64_t stop = std::min(begin + lines, end);
        for (int64_t c = 0; c < kWidth; c += kPanel)
          for (int64_t dr = -1; dr <= 1; ++dr)
            for (int64_t o = 0; o < K; o += kOuts) {
              Vector out[3 * kOuts][C];
              float* to = dw + ((dr + 1) * 3 * outs + o) * kWidth + c;
#pragma GCC unroll 6
              for (int i = 0; i < 3 * kOuts; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < C; ++v) out[i][v] = load(to + (i / kOuts * outs + i % kOuts) * kWidth + v * kLanes);
              for (int64_t line = begin; line < stop; ++line) {
                if (line % (height + 1) == 0) continue;  // Between two images.
                int64_t p = line * images.row + 1;
                const float* left = h + c * rows + (p + dr * images.row - 1) * kPanel;
                for (int64_t q = p; q < p + width; ++q, left += kPanel) {
#pragma GCC unroll 3
                  for (int dc = 0; dc < 3; ++dc) {
                    Vector part[C];
#pragma GCC unroll 8
                    for (int v = 0; v < C; ++v) part[v] = load(left + dc * kPanel + v * kLanes);
#pragma GCC unroll 2
                    for (int j = 0; j < kOuts; ++j) {
                      Vector right = all(dy[q * kOut + o + j]);
#pragma GCC unroll 8
                      for (int v = 0; v < C; ++v)
                        out[dc * kOuts + j][v] = fmadd(part[v], right, out[dc * kOuts + j][v]);
                    }
                  }
                }
              }
#pragma GCC unroll 6
              for (int i = 0; i < 3 * kOuts; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < C; ++v) store(to + (i / kOuts * outs + i % kOuts) * kWidth + v * kLanes, out[i][v]);
            }
      }
    }
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < N; ++v) store(sums.data + (slice * 2 + i) * kWidth + v * kLanes, u_sums[i][v]);
  });
  mean_of(sums.data, slices, 2 * kWidth, batch * height * width, u_means);
  sum_of(pool, partial.data, slices, size, size, total.data);
  for (int64_t s = 0; s < 9; ++s)
    for (int64_t c = 0; c < kWidth; ++c)
      for (int64_t o = 0; o < K; ++o)
        dkernel[(s * kWidth + c) * K + o] = total.data[(s * outs + o) * kWidth + c];
}

constexpr int64_t kRoom = kRows + 24;  // Rows of a panel of dz, where a register tile may end behind its last one.

// One block of at most 16 C channels in the rows of a tile: da, the gradients that need it, and g; dz is in panels.
template <class T, int C, int N>
void block_backward(const float* dz, int64_t count, const float* kernel, int64_t kernel_stride, const T* x,
                    int64_t x_stride, T* g, int64_t g_stride, const float* scale, const float* shift, int64_t channels,
                    float* a, float* dscale, float* dshift, float* dkernel) {
  constexpr int M = tile_rows(C), L = tile_rows(N);
  constexpr int64_t kWidth = N * kLanes, kBlock = C * kLanes, kPanel = Panels<N>::kWidth;
  Vector factor[C], add[C], dscales[C], dshifts[C];
  Lanes lanes[C];
  for (int v = 0; v < C; ++v) {
    lanes[v] = first_lanes(channels - v * kLanes);
    factor[v] = load(scale + v * kLanes, lanes[v]);
    add[v] = load(shift + v * kLanes, lanes[v]);
    dscales[v] = dshifts[v] = zero();
  }
  for (int64_t r = 0; r < count; r += M) {
    Vector out[M][C];
    for (int v = 0; v < C; v += tile_columns(C)) {
      Vector part[M][tile_columns(C)];
      clear(part);
      for (int64_t panel = 0; panel < kWidth; panel += kPanel)
        product(dz + panel * kRoom + r * kPanel, kPanel, 1, kernel + panel * kernel_stride + v * kLanes, kernel_stride,
                kPanel, part);
#pragma GCC unroll 24
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < tile_columns(C); ++w) out[i][v + w] = part[i][w];
    }
    Vector kept[C];
#pragma GCC unroll 24
    for (int i = 0; i < M; ++i) {
      if (r + i >= count) break;
      const T* from = x + (r + i) * x_stride;
      T* to = g + (r + i) * g_stride;
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(from + kRows * x_stride + v * kLanes), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(to + kRows * g_stride + v * kLanes), _MM_HINT_T1);
        kept[v] = load(from + v * kLanes, lanes[v]);
        Vector value = fmadd(kept[v], factor[v], add[v]);
        Mask on = positive(value);  // Not beyond the lanes, where all is zero.
        Vector u = keep(on, out[i][v]);
        store(a + (r + i) * kBlock + v * kLanes, keep(on, value));
        dscales[v] = fmadd(u, kept[v], dscales[v]);
        dshifts[v] = dshifts[v] + u;
        store(to + v * kLanes, fmadd(u, factor[v], load(to + v * kLanes, lanes[v])), lanes[v]);
      }
    }
  }
  for (int v = 0; v < C; ++v) {
    add_to(dscale + v * kLanes, dscales[v]);
    add_to(dshift + v * kLanes, dshifts[v]);
  }
  for (int64_t c = 0; c < kBlock; c += L)
    for (int64_t panel = 0; panel < kWidth; panel += kPanel) {
      Vector out[L][tile_columns(N)];
      load_tile(dkernel + c * kWidth + panel, kWidth, out);
      product(a + c, 1, kBlock, dz + panel * kRoom, kPanel, count, out);
      store_tile(dkernel + c * kWidth + panel, kWidth, out);
    }
}

template <class T, int N>
void bottleneck_backward(ffi::ThreadPool pool, T* g, int64_t rows, int64_t g_stride, const T* x, int64_t x_stride,
                         const T* z, const float* z_means, const T* u, const float* u_means, const float* scale,
                         const float* shift, int64_t channels, const float* kernel, const float* scale2, float* dscale,
                         float* dshift, float* dkernel) {
  constexpr int64_t kWidth = N * kLanes, kBlock = 48;
  int64_t padded = round_up(channels, kBlock) + 24;
  int64_t slices = std::min<int64_t>(std::max<int64_t>(rows / 512, 2), 16);
  int64_t tiles = (rows + kRows - 1) / kRows;
  slices = std::min(slices, tiles);
  int64_t size = padded * (kWidth + 2);
  Normalizer norm(z_means, kWidth);
  Floats transposed(kWidth * padded), partial(slices * size);
  int64_t stride = round_up(channels, kBlock);
  transpose(kernel, channels, kWidth, transposed.data, stride);
  parallel(pool, slices, [&](int64_t slice) {
    float* dz = scratch(0, kRoom * kWidth);
    float* a = scratch(1, kRoom * kBlock + 64);
    float* dkernels = partial.data + slice * size;
    float *dscales = dkernels + padded * kWidth, *dshifts = dscales + padded;
    std::memset(dkernels, 0, size * 4);
    for (int64_t tile = slice * tiles / slices; tile < (slice + 1) * tiles / slices; ++tile) {
      int64_t begin = tile * kRows, count = std::min(kRows, rows - begin);
      for (int v = 0; v < N; ++v) {
        int64_t c = v * kLanes;
        Vector mean = load(norm.mean.data() + c), rstd = load(norm.rstd.data() + c);
        Vector factor = load(scale2 + c) * rstd;
        Vector u_mean = load(u_means + c), uz_mean = load(u_means + kWidth + c);
        for (int64_t r = 0; r < count; ++r) {
          int64_t at = (begin + r) * kWidth + c;
          Vector z_hat = (load(z + at) - mean) * rstd;
          Vector value = fnmadd(z_hat, uz_mean, load(u + at) - u_mean);
          store(dz + Panels<N>::place(kRoom, r, v), value * factor);
        }
      }
      for (int64_t c = 0; c < channels; c += kBlock) {
        auto run = channels - c > 32   ? block_backward<T, 3, N>
                   : channels - c > 16 ? block_backward<T, 2, N>
                                       : block_backward<T, 1, N>;
        run(dz, count, transposed.data + c, stride, x + begin * x_stride + c, x_stride, g + begin * g_stride + c,
            g_stride, scale + c, shift + c, channels - c, a, dscales + c, dshifts + c, dkernels + c * kWidth);
      }
    }
  });
  sum_of(pool, partial.data, slices, size, channels * kWidth, dkernel);
  sum_of(pool, partial.data + padded * kWidth, slices, size, channels, dscale);
  sum_of(pool, partial.data + padded * kWidth + padded, slices, size, channels, dshift);
}

// ---------------------------------------------------------------------------------------------------- inference

// All layers of a few images after each other, whose features stay in the second cache. Where that leaves threads
// without images, all of them share the tiles of each pass.
template <class T, int N, int64_t K>
void inference(ffi::ThreadPool pool, const T* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
               const std::vector<InferenceLayer>& layers, T* out, int64_t stride) {
  using New = Growth<K>;
  constexpr int64_t kWidth = N * kLanes, M = New::kPositions;
  int64_t threads = pool.num_threads(), count = layers.size();
  int64_t fair = (batch + threads - 1) / threads * height * width;  // Every thread has images.
  Images images(batch, height, width, std::min({int64_t(256), std::max<int64_t>(64, (1 << 18) / stride), fair}));
  bool shared = images.groups < threads;
  int64_t group_pixels = images.together * height * width, chunks = (images.end - images.first + M - 1) / M;
  int64_t tile_size = shared ? std::min(kRows, round_up((group_pixels + 2 * threads - 1) / (2 * threads), 8)) : kRows;
  int64_t tiles = (group_pixels + tile_size - 1) / tile_size, rows_of_h = images.positions + M;
  int64_t h_size = rows_of_h * kWidth;
  auto pixels_of = [&](int64_t group) {
    return std::min(images.together, batch - group * images.together) * height * width;
  };
  auto enter = [&](int64_t group, float* h) {
    std::memset(h, 0, h_size * 4);  // The borders stay zero.
    int64_t pixel = group * group_pixels;
    for (int64_t n = pixel; n < pixel + pixels_of(group); ++n)
      std::memcpy(out + n * stride, x + n * channels, channels * sizeof(T));
  };
  auto bottleneck = [&](int64_t group, int64_t i, int64_t task, float* h) {
    const InferenceLayer& layer = layers[i];
    int64_t first = task * tile_size, rows = std::min(tile_size, pixels_of(group) - first);
    float* tile = scratch(1, (kRows + 24) * kWidth);
    Vector shift[N];
    for (int v = 0; v < N; ++v) shift[v] = load(layer.shift2 + v * kLanes);
    bottleneck_tile<T, N>(out + (group * group_pixels + first) * stride, rows, stride, layer.scale, layer.shift,
                          layer.channels, layer.kernel, tile);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t n = first + r, row = n / width;
      int64_t to = images.place(row / height, row % height) + n % width;
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        Vector value = load(tile + r * kWidth + v * kLanes) + shift[v];
        store(h + Panels<N>::place(rows_of_h, to, v), relu(value));
      }
    }
  };
  auto convolve = [&](int64_t group, int64_t i, int64_t chunk, const float* h) {
    float* values = scratch(2, M * New::kWidth);
    int64_t first = images.first + chunk * M, last = std::min(first + M, images.end);
    convolve_positions<N, K>(images, h, rows_of_h, layers[i].kernel2, first, values);
    for (int64_t p = first; p < last; ++p) {
      int64_t column = p % images.row - 1, line = p / images.row - 1, row = line % (height + 1);
      int64_t n = (line / (height + 1) * height + row) * width + column;
      if (column < 0 || row == height || n >= pixels_of(group)) continue;
      T* to = out + (group * group_pixels + n) * stride + layers[i].channels;
      for (int v = 0; v < New::kVectors; ++v)
        store(to + v * kLanes, load(values + (p - first) * New::kWidth + v * kLanes), first_lanes(K - v * kLanes));
    }
  };
  if (!shared) {
    parallel(pool, images.groups, [&](int64_t group) {
      float* h = scratch(3, h_size);
      enter(group, h);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t task = 0; task * tile_size < pixels_of(group); ++task) bottleneck(group, i, task, h);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) convolve(group, i, chunk, h);
      }
    });
    return;
  }
  float* all = scratch(4, images.groups * h_size);
  int64_t most = std::max(tiles, chunks);
  parallel(pool, 2 * count + 1, images.groups * most, [&](int64_t phase, int64_t task) {
    int64_t group = task / most, part = task % most, i = (phase - 1) / 2;
    float* h = all + group * h_size;
    if (phase == 0) {
      if (part == 0) enter(group, h);
    } else if (phase % 2) {
      if (part * tile_size < pixels_of(group)) bottleneck(group, i, part, h);
    } else if (part < chunks) {
      convolve(group, i, part, h);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- handlers

// One library for each bottleneck width, growth rate and element type, so that compiling takes seconds.
using Element = PARANET_ELEMENT;
constexpr int kWidths = PARANET_WIDTH / 16;

ffi::Error Bottleneck(ffi::ThreadPool pool, In x, In scale, In shift, In kernel, Out z, Out means) {
  auto in = x.dimensions(), k = kernel.dimensions();
  bottleneck<Element, kWidths>(pool, as<Element>(x), in[0], in[1], floats(scale), floats(shift), k[0], floats(kernel),
                               as<Element>(z), floats(means));
  return ffi::Error::Success();
}

ffi::Error Convolve(ffi::ThreadPool pool, In z, In z_means, In scale, In shift, In kernel, Out y, Out means,
                    int64_t height, int64_t width) {
  int64_t batch = z.dimensions()[0] / (height * width);
  convolve<Element, kWidths, PARANET_GROWTH>(pool, as<Element>(z), floats(z_means), floats(scale), floats(shift),
                                             floats(kernel), batch, height, width, as<Element>(y), floats(means));
  return ffi::Error::Success();
}

ffi::Error Append(ffi::ThreadPool pool, In x, In y, In means, Out out, int64_t offset) {
  auto in = x.dimensions();
  if (as<Element>(x) != as<Element>(out)) std::memcpy(as<Element>(out), as<Element>(x), x.size_bytes());
  append<Element>(pool, as<Element>(out), in[0], in[1], as<Element>(y), floats(means), PARANET_GROWTH, offset);
  return ffi::Error::Success();
}

ffi::Error AppendMeans(ffi::ThreadPool pool, In g, In x, Out means, int64_t offset) {
  append_means<Element>(pool, as<Element>(g), g.dimensions()[0], g.dimensions()[1], as<Element>(x), x.dimensions()[1],
                        PARANET_GROWTH, offset, floats(means));
  return ffi::Error::Success();
}

ffi::Error ConvolveBackward(ffi::ThreadPool pool, In g, In x, In g_means, In y_means, In z, In z_means, In scale,
                            In shift, In kernel, Out u, Out u_means, Out dkernel, int64_t offset, int64_t height,
                            int64_t width) {
  int64_t batch = z.dimensions()[0] / (height * width);
  convolve_backward<Element, kWidths, PARANET_GROWTH>(
      pool, as<Element>(g), g.dimensions()[1], as<Element>(x), x.dimensions()[1], offset, floats(g_means),
      floats(y_means), as<Element>(z), floats(z_means), floats(scale), floats(shift), floats(kernel), batch, height,
      width, as<Element>(u), floats(u_means), floats(dkernel));
  return ffi::Error::Success();
}

ffi::Error BottleneckBackward(ffi::ThreadPool pool, In g, In x, In z, In z_means, In u, In u_means, In scale, In shift,
                              In kernel, In scale2, Out out, Out dscale, Out dshift, Out dkernel) {
  auto in = g.dimensions();
  if (as<Element>(g) != as<Element>(out)) std::memcpy(as<Element>(out), as<Element>(g), g.size_bytes());
  bottleneck_backward<Element, kWidths>(pool, as<Element>(out), in[0], in[1], as<Element>(x), x.dimensions()[1],
                                        as<Element>(z), floats(z_means), as<Element>(u), floats(u_means),
                                        floats(scale), floats(shift), kernel.dimensions()[0], floats(kernel),
                                        floats(scale2), floats(dscale), floats(dshift), floats(dkernel));
  return ffi::Error::Success();
}

ffi::Error Inference(ffi::ThreadPool pool, In x, ffi::RemainingArgs parameters, Out out) {
  auto in = x.dimensions();
  inference<Element, kWidths, PARANET_GROWTH>(pool, as<Element>(x), in[0], in[1], in[2], in[3], layers_of(parameters),
                                              as<Element>(out), out->dimensions()[3]);
  return ffi::Error::Success();
}

}  // namespace

#define ARGS3 ARG ARG ARG

// Two parts, which may be compiled side by side.
#if !defined(PARANET_PART) || PARANET_PART == 0
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_bottleneck, Bottleneck, BIND ARGS3 ARG RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_convolve, Convolve,
                              BIND ARGS3 ARG ARG RET RET.Attr<int64_t>("height").Attr<int64_t>("width"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_append, Append, BIND ARGS3 RET.Attr<int64_t>("offset"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_append_means, AppendMeans, BIND ARG ARG RET.Attr<int64_t>("offset"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_inference, Inference, BIND ARG.RemainingArgs() RET);
#endif
#if !defined(PARANET_PART) || PARANET_PART == 1
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_convolve_backward, ConvolveBackward,
                              BIND ARGS3 ARGS3 ARGS3 RET RET RET.Attr<int64_t>("offset")
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("width"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_bottleneck_backward, BottleneckBackward,
                              BIND ARGS3 ARGS3 ARGS3 ARG RET RET RET RET);
#endif
