// Vectors of 16 floats: a register with AVX-512, two with AVX2.
//
// +, - and * work by lane on both. `Lanes` are the first of a vector, `Mask` any of them. kRegisters vectors fit the
// registers as accumulators of a product, beside what it reads.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;

struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

using Vector = __m512;
using Mask = __mmask16;
using Lanes = Mask;
constexpr int kRegisters = 24;
constexpr bool kFreeMasks = true;  // A load or store of some lanes takes no longer than of all.

Lanes first_lanes(int64_t n) { return n >= kLanes ? Lanes(0xffff) : Lanes((1u << std::max<int64_t>(n, 0)) - 1); }

Vector zero() { return _mm512_setzero_ps(); }
Vector all(float value) { return _mm512_set1_ps(value); }
Vector fmadd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
Vector fnmadd(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }

Mask positive(Vector v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_GT_OQ); }
Vector keep(Mask mask, Vector v) { return _mm512_maskz_mov_ps(mask, v); }

// A NaN stays one: where an operand is NaN, the second is taken.
Vector relu(Vector v) { return _mm512_max_ps(zero(), v); }

// A NaN of either stays one.
Vector larger(Vector a, Vector b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

Vector load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
Vector load(const float* from) { return _mm512_loadu_ps(from); }
Vector load(const BFloat16* from, Lanes lanes) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
Vector load(const BFloat16* from) { return load(from, Lanes(0xffff)); }

// The first LANES; the others may have what follows in memory, up to as many again, but not at its END.
template <int64_t LANES, bool END>
Vector load_first(const float* from) {
  return LANES == kLanes ? load(from) : load(from, first_lanes(LANES));
}
// fmadd of the first LANES at least.
template <int64_t LANES>
Vector fmadd_first(Vector a, Vector b, Vector c) {
  return fmadd(a, b, c);
}

void store(float* to, Vector v, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes, v); }
void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
void store(BFloat16* to, Vector v, Lanes lanes) {  // Rounds to nearest, ties to even.
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
void store(BFloat16* to, Vector v) { store(to, v, Lanes(0xffff)); }

// Lane i: from[i * step].
Vector strided(const float* from, int64_t step, Lanes lanes) {
  __m512i index = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(int(step)));
  return _mm512_mask_i32gather_ps(zero(), lanes, index, from, 4);
}

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

#else

struct Vector {
  __m256 low, high;
};
using Mask = Vector;
using Lanes = int;  // How many.
constexpr int kRegisters = 6;
constexpr bool kFreeMasks = false;
constexpr int kHalf = 8;

Lanes first_lanes(int64_t n) { return int(std::clamp<int64_t>(n, 0, kLanes)); }

inline Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
inline Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
inline Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }

inline Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vector all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector fmadd(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector fnmadd(Vector a, Vector b, Vector c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline Mask positive(Vector v) {
  __m256 zeros = _mm256_setzero_ps();
  return {_mm256_cmp_ps(v.low, zeros, _CMP_GT_OQ), _mm256_cmp_ps(v.high, zeros, _CMP_GT_OQ)};
}
inline Vector keep(Mask mask, Vector v) { return {_mm256_and_ps(mask.low, v.low), _mm256_and_ps(mask.high, v.high)}; }

// A NaN stays one: where an operand is NaN, the second is taken.
inline Vector relu(Vector v) {
  return {_mm256_max_ps(_mm256_setzero_ps(), v.low), _mm256_max_ps(_mm256_setzero_ps(), v.high)};
}

inline __m256 larger(__m256 a, __m256 b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
// A NaN of either stays one.
inline Vector larger(Vector a, Vector b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }

inline Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + kHalf)}; }
inline __m256 load_half(const float* from, int n) {
  static constexpr int32_t kMasks[2 * kHalf] = {-1, -1, -1, -1, -1, -1, -1, -1};
  if (n >= kHalf) return _mm256_loadu_ps(from);
  if (n <= 0) return _mm256_setzero_ps();
  const int32_t* mask = kMasks + kHalf - n;
  return _mm256_maskload_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask)));
}
inline Vector load(const float* from, Lanes lanes) {
  return {load_half(from, lanes), load_half(from + kHalf, lanes - kHalf)};
}
inline __m256 widened(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vector load(const BFloat16* from) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  return {widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))};
}
inline Vector load(const BFloat16* from, Lanes lanes) {
  if (lanes == kLanes) return load(from);
  BFloat16 copy[kLanes] = {};
  std::memcpy(copy, from, lanes * sizeof(BFloat16));
  return load(copy);
}

// The first LANES; the others may have what follows in memory, up to as many again, but not at its END.
template <int64_t LANES, bool END>
inline Vector load_first(const float* from) {
  constexpr int64_t kRead = (LANES + kHalf - 1) / kHalf * kHalf;
  return load(from, int(END || kRead > 2 * LANES ? LANES : kRead));
}
// fmadd of the first LANES at least.
template <int64_t LANES>
inline Vector fmadd_first(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), LANES > kHalf ? _mm256_fmadd_ps(a.high, b.high, c.high) : c.high};
}

inline void store(float* to, Vector v) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + kHalf, v.high);
}
// Without masks: a store with one takes many cycles on processors of AMD.
inline void store_half(float* to, __m256 v, int n) {
  if (n >= kHalf) return _mm256_storeu_ps(to, v);
  if (n <= 0) return;
  __m128 rest = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(to, rest);
    to += 4;
    rest = _mm256_extractf128_ps(v, 1);
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    to += 2;
    rest = _mm_movehl_ps(rest, rest);
  }
  if (n & 1) _mm_store_ss(to, rest);
}
inline void store(float* to, Vector v, Lanes lanes) {
  store_half(to, v.low, lanes);
  store_half(to + kHalf, v.high, lanes - kHalf);
}
inline __m256i shortened(__m256 v) {  // Rounds to nearest, ties to even.
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store(BFloat16* to, Vector v) {
  __m256i packed = _mm256_packus_epi32(shortened(v.low), shortened(v.high));  // Within 128 bits.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(BFloat16* to, Vector v, Lanes lanes) {
  if (lanes == kLanes) return store(to, v);
  BFloat16 copy[kLanes];
  store(copy, v);
  std::memcpy(to, copy, lanes * sizeof(BFloat16));
}

// Lane i: from[i * step].
Vector strided(const float* from, int64_t step, Lanes lanes) {
  float values[kLanes] = {};
  for (int i = 0; i < lanes; ++i) values[i] = from[i * step];
  return load(values);
}

inline void transpose(__m256 (&v)[kHalf]) {
  __m256 t[kHalf];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// 16 x 16 numbers: row i, lane j to row j, lane i.
void transpose(Vector (&v)[kLanes]) {
  __m256 quarters[4][kHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    quarters[0][i] = v[i].low;
    quarters[1][i] = v[kHalf + i].low;
    quarters[2][i] = v[i].high;
    quarters[3][i] = v[kHalf + i].high;
  }
  for (auto& quarter : quarters) transpose(quarter);
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    v[i] = {quarters[0][i], quarters[1][i]};
    v[kHalf + i] = {quarters[2][i], quarters[3][i]};
  }
}

#endif

void add_to(float* to, Vector v) { store(to, load(to) + v); }

}  // namespace
