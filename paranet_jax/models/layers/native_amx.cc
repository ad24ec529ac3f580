// A dense block in inference with AMX, the matrix unit of Intel processors from 2023 on; called by native_inference.py.
//
// AMX adds the product of a tile of 16 x 32 and one of 32 x 16 bfloat16 numbers to a tile of 16 x 16 float32 numbers, in
// 16 cycles. Here the first holds weights of 16 output channels, the second 32 input channels of 16 images at one pixel,
// and the third that pixel's 16 output channels of the 16 images. The second lies in memory as AMX reads it: for each
// pair of channels, and for each of the 16 images, both numbers. Features and the bottleneck's results are stored so.
//
// Values are rounded to bfloat16 where XLA's program for bfloat16 rounds them: features, and what a convolution reads.
// Each number is computed in the same way by any number of threads.

#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

namespace {

constexpr int64_t kPair = 2 * kImages;  // Two channels of 16 images.
constexpr int64_t kDepth = 32;          // Channels that a product reads.
constexpr int64_t kTile = 16 * 32;
constexpr int64_t kSums = 16 * 16;
constexpr int64_t kRing = 4;            // Panels in flight: a product reads what was written two panels before.
constexpr int64_t kLead = 2;

// Numbers of tiles are part of the instructions, so these are macros. The compiler must not move what is written to memory
// behind the loads of tiles.
#define TILE_LOAD(tile, from) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(64)) : "memory")
#define TILE_STORE(tile, to) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(64)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define TILE_PRODUCT(sums, weights, values) \
  asm volatile("tdpbf16ps %%tmm" #values ", %%tmm" #weights ", %%tmm" #sums ::)

// The unit's state for a thread: rows and bytes a row of each tile.
struct Unit {
  // Tiles 0 to 5 are sums, 6 weights, 7 values.
  static Unit of_products() {
    Unit unit;
    for (int i = 0; i < 8; ++i) unit.set(i, 16, 64);
    return unit;
  }
  // Tiles 0 to 3 are sums, 4 weights, 5 values; 6 and 7 those of half the depth.
  static Unit of_convolutions(int64_t rows) {
    Unit unit;
    for (int i = 0; i < 5; ++i) unit.set(i, rows, 64);
    unit.set(5, 16, 64);
    unit.set(6, rows, 32);
    unit.set(7, 8, 64);
    return unit;
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
  static void release() { asm volatile("tilerelease" ::); }

 private:
  void set(int tile, int64_t rows, int64_t bytes) {
    rows_[tile] = uint8_t(rows);
    bytes_[tile] = uint16_t(bytes);
  }
  uint8_t palette_ = 1, start_ = 0, reserved_[14] = {};
  uint16_t bytes_[16] = {};
  uint8_t rows_[16] = {};
};
static_assert(sizeof(Unit) == 64, "as the processor reads it");

// Even and odd channels of 16 images each, to pairs.
void store_pair(BFloat16* to, Vector even, Vector odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

struct Layer : InferenceLayer {
  BFloat16 *products, *convolutions;  // Both kernels as tiles.
  float* sums;                        // shift2 as tiles, with which the sums begin.
};

// A block's sizes. Features are [H W, total / 2, 16 images, 2], z is [H, W + 2, bottleneck / 2, 16 images, 2] with zeros
// in the first and last column.
struct Block {
  int64_t height, width, total, bottleneck, growth;
  int64_t tiles() const { return bottleneck / 16; }
  int64_t new_tiles() const { return (growth + 15) / 16; }
  int64_t panels(const Layer& layer) const { return (layer.channels + kDepth - 1) / kDepth; }
  int64_t row_panels() const { return (3 * bottleneck + kDepth - 1) / kDepth; }  // Of three pixels side by side.
};

// A tile of weights [16 columns, 32 rows] of a matrix, with zeros where it ends.
void pack_tile(const float* from, int64_t stride, int64_t rows, int64_t columns, BFloat16* to) {
  Mask mask = first_lanes(columns);
  Vector halves[2][kLanes];
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < 16; ++i) {
      int64_t row = half * 16 + i;
      halves[half][i] = row < rows ? load(from + row * stride, mask) : _mm512_setzero_ps();
    }
    transpose(halves[half]);
  }
  for (int64_t i = 0; i < 16; ++i)
    _mm512_storeu_si512(to + i * kDepth, (__m512i)_mm512_cvtne2ps_pbh(halves[1][i], halves[0][i]));
}

void pack(const Block& block, const Layer& layer) {
  int64_t tiles = block.tiles(), panels = block.panels(layer), row_panels = block.row_panels();
  for (int64_t k = 0; k < panels; ++k)
    for (int64_t n = 0; n < tiles; ++n)
      pack_tile(layer.kernel + k * kDepth * block.bottleneck + n * 16, block.bottleneck, layer.channels - k * kDepth, 16,
                layer.products + (k * tiles + n) * kTile);
  for (int64_t n = 0; n < block.new_tiles(); ++n)
    for (int64_t row = 0; row < 3; ++row)
      for (int64_t k = 0; k < row_panels; ++k)
        pack_tile(layer.kernel2 + (row * 3 * block.bottleneck + k * kDepth) * block.growth + n * 16, block.growth,
                  3 * block.bottleneck - k * kDepth, block.growth - n * 16,
                  layer.convolutions + ((n * 3 + row) * row_panels + k) * kTile);
  for (int64_t i = 0; i < block.bottleneck; ++i) store(layer.sums + i * kLanes, _mm512_set1_ps(layer.shift2[i]));
}

// relu(scale x + shift) of up to 16 pairs of channels of two pixels: a tile of each.
__attribute__((always_inline)) inline void activate(const float* scale, const float* shift, const BFloat16* x,
                                                    int64_t pixel, int64_t pairs, BFloat16* to) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
#pragma GCC unroll 4
  for (int64_t c = 0; c < pairs; ++c) {
    Vector scale0 = _mm512_set1_ps(scale[2 * c]), scale1 = _mm512_set1_ps(scale[2 * c + 1]);
    Vector shift0 = _mm512_set1_ps(shift[2 * c]), shift1 = _mm512_set1_ps(shift[2 * c + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i both = _mm512_loadu_si512(x + i * pixel + c * kPair);
      Vector even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      Vector odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
      store_pair(to + i * kTile + c * kPair, relu(_mm512_fmadd_ps(even, scale0, shift0)),
                 relu(_mm512_fmadd_ps(odd, scale1, shift1)));
    }
  }
  for (int64_t c = pairs; c < 16; ++c)
    for (int i = 0; i < 2; ++i) _mm512_storeu_si512(to + i * kTile + c * kPair, _mm512_setzero_si512());
}

// Adds a panel's products: G tiles of output channels of two pixels.
template <int G>
__attribute__((always_inline)) inline void multiply(const BFloat16* weights, const BFloat16* values) {
  TILE_LOAD(7, values);
  TILE_LOAD(6, weights);
  TILE_PRODUCT(0, 6, 7);
  if constexpr (G > 1) {
    TILE_LOAD(6, weights + kTile);
    TILE_PRODUCT(1, 6, 7);
  }
  if constexpr (G > 2) {
    TILE_LOAD(6, weights + 2 * kTile);
    TILE_PRODUCT(2, 6, 7);
  }
  TILE_LOAD(7, values + kTile);
  if constexpr (G > 2) {
    TILE_PRODUCT(5, 6, 7);
    TILE_LOAD(6, weights + kTile);
  }
  if constexpr (G > 1) {
    TILE_PRODUCT(4, 6, 7);
    TILE_LOAD(6, weights);
  }
  TILE_PRODUCT(3, 6, 7);
}

// relu of G tiles of sums to pairs of channels.
void store_relu(const float* sums, int64_t tiles, BFloat16* to) {
  for (int64_t i = 0; i < tiles * 8; ++i)
    store_pair(to + i * kPair, relu(load(sums + 2 * i * kLanes)), relu(load(sums + (2 * i + 1) * kLanes)));
}

// z = relu(relu(scale x + shift) kernel + shift2) of a row of pixels.
template <int G>
void bottleneck_row(const Block& block, const Layer& layer, int64_t row, const BFloat16* features, BFloat16* z) {
  static const Unit unit = Unit::of_products();
  unit.load();
  int64_t tiles = block.tiles(), panels = block.panels(layer), ring = tiles == G ? kRing : panels;
  int64_t pixel = block.total * kImages;
  auto* panel = reinterpret_cast<BFloat16*>(scratch(0, ring * kTile));
  alignas(64) float sums[6 * kSums];
  for (int64_t p = 0; p < block.width; p += 2) {
    const BFloat16* x = features + (row * block.width + p) * pixel;
    BFloat16* to = z + (row * (block.width + 2) + p + 1) * block.bottleneck * kImages;
    for (int64_t n = 0; n < tiles; n += G) {
      const float* first = layer.sums + n * kSums;
      TILE_LOAD(0, first);
      TILE_LOAD(3, first);
      if constexpr (G > 1) {
        TILE_LOAD(1, first + kSums);
        TILE_LOAD(4, first + kSums);
      }
      if constexpr (G > 2) {
        TILE_LOAD(2, first + 2 * kSums);
        TILE_LOAD(5, first + 2 * kSums);
      }
      int64_t lead = n ? 0 : kLead;
      for (int64_t k = 0; k < panels + lead; ++k) {
        if (!n && k < panels) {
          int64_t c = k * kDepth, pairs = std::min(kDepth, layer.channels - c) / 2;
          BFloat16* at = panel + k % ring * 2 * kTile;
          if (pairs == 16) {  // A constant: its loop is unrolled.
            activate(layer.scale + c, layer.shift + c, x + c * kImages, pixel, 16, at);
          } else {
            activate(layer.scale + c, layer.shift + c, x + c * kImages, pixel, pairs, at);
          }
        }
        if (k >= lead)
          multiply<G>(layer.products + ((k - lead) * tiles + n) * kTile, panel + (k - lead) % ring * 2 * kTile);
      }
      TILE_STORE(0, sums);
      TILE_STORE(3, sums + 3 * kSums);
      if constexpr (G > 1) {
        TILE_STORE(1, sums + kSums);
        TILE_STORE(4, sums + 4 * kSums);
      }
      if constexpr (G > 2) {
        TILE_STORE(2, sums + 2 * kSums);
        TILE_STORE(5, sums + 5 * kSums);
      }
      for (int64_t i = 0; i < 2; ++i)
        store_relu(sums + i * 3 * kSums, G, to + i * block.bottleneck * kImages + n * 8 * kPair);
    }
  }
}

// Adds a panel's products for four pixels.
#define FOUR_PIXELS(weights_tile, values_tile)  \
  TILE_LOAD(weights_tile, weights);             \
  TILE_LOAD(values_tile, from);                 \
  TILE_PRODUCT(0, weights_tile, values_tile);   \
  TILE_LOAD(values_tile, from + pixel);         \
  TILE_PRODUCT(1, weights_tile, values_tile);   \
  TILE_LOAD(values_tile, from + 2 * pixel);     \
  TILE_PRODUCT(2, weights_tile, values_tile);   \
  TILE_LOAD(values_tile, from + 3 * pixel);     \
  TILE_PRODUCT(3, weights_tile, values_tile)

// The layer's new channels of a row of pixels.
void convolve_row(const Block& block, const Layer& layer, int64_t row, const BFloat16* z, BFloat16* features) {
  Unit::of_convolutions(std::min<int64_t>(block.growth, 16)).load();
  int64_t pixel = block.bottleneck * kImages, z_row = (block.width + 2) * pixel;
  int64_t panels = block.row_panels(), whole = 3 * block.bottleneck / kDepth;
  alignas(64) float sums[4 * kSums];
  for (int64_t p = 0; p < block.width; p += 4)
    for (int64_t n = 0; n < block.new_tiles(); ++n) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
      for (int64_t dr = -1; dr <= 1; ++dr) {
        if (row + dr < 0 || row + dr >= block.height) continue;
        const BFloat16* from = z + (row + dr) * z_row + p * pixel;
        const BFloat16* weights = layer.convolutions + (n * 3 + dr + 1) * panels * kTile;
        for (int64_t k = 0; k < whole; ++k, from += kTile, weights += kTile) {
          FOUR_PIXELS(4, 5);
        }
        if (whole < panels) {
          FOUR_PIXELS(6, 7);
        }
      }
      TILE_STORE(0, sums);
      TILE_STORE(1, sums + kSums);
      TILE_STORE(2, sums + 2 * kSums);
      TILE_STORE(3, sums + 3 * kSums);
      int64_t pairs = std::min<int64_t>(16, block.growth - n * 16) / 2;
      for (int64_t i = 0; i < 4; ++i) {
        BFloat16* to = features + ((row * block.width + p + i) * block.total + layer.channels + n * 16) * kImages;
        const float* from = sums + i * kSums;
        for (int64_t c = 0; c < pairs; ++c)
          store_pair(to + c * kPair, load(from + 2 * c * kLanes), load(from + (2 * c + 1) * kLanes));
      }
    }
}

template <int G>
void dense_block(ffi::ThreadPool& pool, const Block& block, const BFloat16* x, int64_t batch, int64_t channels,
                 std::vector<Layer>& layers, BFloat16* out) {
  int64_t groups = batch / kImages, pixels = block.height * block.width;
  int64_t size = pixels * block.total * kImages, z_row = (block.width + 2) * block.bottleneck * kImages;
  int64_t convolutions = block.new_tiles() * 3 * block.row_panels() * kTile, total = 0;
  for (const Layer& layer : layers)
    total += block.panels(layer) * block.tiles() * kTile + convolutions + 2 * block.tiles() * kSums;
  auto* kernels = reinterpret_cast<BFloat16*>(scratch(1, total / 2));
  for (Layer& layer : layers) {
    layer.products = kernels;
    layer.convolutions = layer.products + block.panels(layer) * block.tiles() * kTile;
    layer.sums = reinterpret_cast<float*>(layer.convolutions + convolutions);
    kernels = reinterpret_cast<BFloat16*>(layer.sums + block.tiles() * kSums);
  }
  parallel(pool, int64_t(layers.size()), [&](int64_t i) { pack(block, layers[i]); });

  auto halves = [](auto* floats) { return reinterpret_cast<BFloat16*>(floats); };
  // Pairs of channels are moved as one number, as large as a float.
  auto enter = [&](int64_t group, int64_t row, float* features, float* z) {
    for (int64_t p = row * block.width; p < (row + 1) * block.width; ++p)
      gather(reinterpret_cast<const float*>(x + (group * kImages * pixels + p) * channels), pixels * channels / 2,
             channels / 2, features + p * block.total * kImages / 2);
    int64_t bytes = block.bottleneck * kPair;
    std::memset(halves(z) + row * z_row, 0, bytes);
    std::memset(halves(z) + row * z_row + (block.width + 1) * block.bottleneck * kImages, 0, bytes);
  };
  auto bottleneck = [&](int64_t layer, int64_t row, float* features, float* z) {
    bottleneck_row<G>(block, layers[layer], row, halves(features), halves(z));
  };
  auto convolve = [&](int64_t layer, int64_t row, float* features, float* z) {
    convolve_row(block, layers[layer], row, halves(z), halves(features));
  };
  auto leave = [&](int64_t group, int64_t row, const float* features) {
    for (int64_t p = row * block.width; p < (row + 1) * block.width; ++p)
      scatter(features + p * block.total * kImages / 2, block.total / 2,
              reinterpret_cast<float*>(out + (group * kImages * pixels + p) * block.total), pixels * block.total / 2);
  };
  each_row(pool, groups, block.height, layers.size(), size / 2, block.height * z_row / 2, enter, bottleneck, convolve,
           leave, Unit::release);
}

ffi::Error DenseBlock(ffi::ThreadPool pool, In x, ffi::RemainingArgs parameters, Out out) {
  auto in = x.dimensions();
  std::vector<Layer> layers;
  for (const InferenceLayer& layer : layers_of(parameters)) layers.push_back({layer, nullptr, nullptr, nullptr});
  Block block{in[1], in[2], int64_t(out->dimensions()[3]), layers[0].bottleneck, layers[0].growth};
  auto run = [&](auto function) { function(pool, block, as<BFloat16>(x), in[0], in[3], layers, as<BFloat16>(out)); };
  int64_t tiles = block.tiles();
  if (tiles % 3 == 0) {
    run(dense_block<3>);
  } else {
    tiles % 2 ? run(dense_block<1>) : run(dense_block<2>);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paranet_dense_block, DenseBlock, BIND ARG.RemainingArgs() RET);

// Asks the system for the use of the unit, which a process has to; 0: it does not grant it.
extern "C" int paranet_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
