// Grids for sixteen floats at a time, and the elementwise kernels and range searches on them, for 16-bit elements above
// all: GCC 12 turns their conversions into integer arithmetic. Same bits as the formulas of numerics.h.
#pragma once

#include "fake_quant.h"
#include "lanes_avx512.h"

#ifdef CLUSTERQ_X86
namespace clusterq {
namespace {

CLUSTERQ_LANES __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
}

// Bounds are codes counted from the zero point.
struct GridLanes {
  __m512 inverse, scale, low, high;
};

CLUSTERQ_LANES GridLanes grid_lanes(const OneGrid<float>& one, int64_t, __mmask16) {
  const Grid<float>& grid = one.grid;
  return {_mm512_set1_ps(grid.inverse), _mm512_set1_ps(grid.scale), _mm512_set1_ps(grid.quant_min - grid.zero_point),
          _mm512_set1_ps(grid.quant_max - grid.zero_point)};
}

CLUSTERQ_LANES GridLanes grid_lanes(const GridRow<float>& row, int64_t i, __mmask16 lanes) {
  const __m512 zero_point = _mm512_maskz_loadu_ps(lanes, row.zero_point + i);
  return {_mm512_maskz_loadu_ps(lanes, row.inverse + i), _mm512_maskz_loadu_ps(lanes, row.scale + i),
          _mm512_sub_ps(_mm512_set1_ps(row.quant_min), zero_point),
          _mm512_sub_ps(_mm512_set1_ps(row.quant_max), zero_point)};
}

struct ActivationLanes {
  __m512 low, high;
};

CLUSTERQ_LANES ActivationLanes activation_lanes(const Activation<float>& activation) {
  return {_mm512_set1_ps(activation.low), _mm512_set1_ps(activation.high)};
}

// Maximum and minimum return their second operand for a NaN.
CLUSTERQ_LANES __m512 clamp_lanes(__m512 v, __m512 low, __m512 high) {
  return _mm512_min_ps(high, _mm512_max_ps(low, v));
}

CLUSTERQ_LANES __m512 round_lanes(__m512 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }

// The elements of `grad` where `kept`, else +0: 16-bit ones as they are, without rounding them again.
CLUSTERQ_LANES void store_kept(float* y, const float* grad, __mmask16 kept, __mmask16 lanes) {
  _mm512_mask_storeu_ps(y, lanes, _mm512_maskz_loadu_ps(kept, grad));
}
template <typename T>
CLUSTERQ_LANES void store_kept(T* y, const T* grad, __mmask16 kept, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(y, lanes, _mm256_maskz_loadu_epi16(kept, grad));
}

// Inside the activation's open interval.
CLUSTERQ_LANES __mmask16 active_lanes(__mmask16 lanes, __m512 x, const ActivationLanes& activation) {
  lanes = _mm512_mask_cmp_ps_mask(lanes, x, activation.low, _CMP_GT_OQ);
  return _mm512_mask_cmp_ps_mask(lanes, x, activation.high, _CMP_LT_OQ);
}

// The bounds with the activation folded into them, see `to_steps`.
CLUSTERQ_LANES GridLanes folded(const GridLanes& grid, const ActivationLanes& activation) {
  const __m512 low = round_lanes(_mm512_mul_ps(activation.low, grid.inverse));
  const __m512 high = round_lanes(_mm512_mul_ps(activation.high, grid.inverse));
  return {grid.inverse, grid.scale, clamp_lanes(low, grid.low, grid.high), clamp_lanes(high, grid.low, grid.high)};
}

CLUSTERQ_LANES __m512 quantized_lanes(__m512 x, const GridLanes& grid) {
  const __m512 code = clamp_lanes(round_lanes(_mm512_mul_ps(x, grid.inverse)), grid.low, grid.high);
  // Adding 0 turns -0 into +0.
  return _mm512_mul_ps(_mm512_add_ps(code, _mm512_setzero_ps()), grid.scale);
}

// Calls `body(i, lanes, grid)` for every sixteen of n elements, `grid` being `prepare` of theirs, made once for all
// that share it.
template <typename P, typename F>
CLUSTERQ_LANES void for_lanes(int64_t n, const OneGrid<float>& one, const P& prepare, const F& body) {
  const GridLanes grid = prepare(grid_lanes(one, 0, 0xffff));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, static_cast<__mmask16>(0xffff), grid);
  if (i < n) body(i, first_lanes(n - i), grid);
}

// A period of kVectors vectors, whose grids stay in registers while memory is walked in order.
template <int kVectors, typename P, typename F>
CLUSTERQ_LANES void for_periods(int64_t n, const GridRow<float>& row, const P& prepare, const F& body) {
  GridLanes grids[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) grids[k] = prepare(grid_lanes(row, 16 * k, first_lanes(n - 16 * k)));
  int64_t i = 0;
  for (; i + 16 * kVectors <= n; i += 16 * kVectors)
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) body(i + 16 * k, static_cast<__mmask16>(0xffff), grids[k]);
  for (int k = 0; i < n; ++k, i += 16) body(i, first_lanes(n - i), grids[k]);
}

template <typename P, typename F>
CLUSTERQ_LANES void for_lanes(int64_t n, const GridRow<float>& row, const P& prepare, const F& body) {
  if (row.period == 16 && n >= 16) return for_periods<1>(n, row, prepare, body);
  if (row.period == 32 && n >= 32) return for_periods<2>(n, row, prepare, body);
  if (row.period == 64 && n >= 64) return for_periods<4>(n, row, prepare, body);
  // Column by column.
  for (int64_t column = 0; column < std::min(n, row.period); column += 16) {
    const GridLanes grid = prepare(grid_lanes(row, column, first_lanes(n - column)));
    int64_t i = column;
    for (; i + 16 <= n; i += row.period) body(i, static_cast<__mmask16>(0xffff), grid);
    if (i < n) body(i, first_lanes(n - i), grid);
  }
}

#define CLUSTERQ_LANES_LAMBDA __attribute__((target(CLUSTERQ_AVX512), always_inline))

template <typename T, typename G>
__attribute__((target(CLUSTERQ_AVX512))) void forward_lanes(const T* x, T* y, int64_t n, const G& grids,
                                                            const Activation<float>& activation) {
  const ActivationLanes active = activation_lanes(activation);
  const auto prepare = [&](const GridLanes& grid) CLUSTERQ_LANES_LAMBDA { return folded(grid, active); };
  for_lanes(n, grids, prepare, [&](int64_t i, __mmask16 lanes, const GridLanes& grid) CLUSTERQ_LANES_LAMBDA {
    store_lanes(y + i, quantized_lanes(load_lanes(x + i, lanes), grid), lanes);
  });
}

template <typename T, typename G>
__attribute__((target(CLUSTERQ_AVX512))) void backward_lanes(const T* grad, const T* x, T* grad_x, int64_t n,
                                                             const G& grids, const Activation<float>& activation) {
  const ActivationLanes active = activation_lanes(activation);
  const auto prepare = [](const GridLanes& grid) CLUSTERQ_LANES_LAMBDA { return grid; };
  for_lanes(n, grids, prepare, [&](int64_t i, __mmask16 lanes, const GridLanes& grid) CLUSTERQ_LANES_LAMBDA {
    const __m512 from = load_lanes(x + i, lanes);
    const __m512 rounded = round_lanes(_mm512_mul_ps(clamp_lanes(from, active.low, active.high), grid.inverse));
    const __m512 bounded = clamp_lanes(rounded, grid.low, grid.high);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(lanes, rounded, bounded, _CMP_EQ_OQ);
    store_kept(grad_x + i, grad + i, active_lanes(inside, from, active), lanes);
  });
}

// Moves `low` and `high` out to the finite ones of sixteen activated elements.
template <typename T>
CLUSTERQ_LANES void extend_lanes(const T* x, __mmask16 lanes, const ActivationLanes& activation, __m512& low,
                                 __m512& high) {
  constexpr int kNanOrInfinite = 0x01 | 0x08 | 0x10 | 0x80;
  const __m512 v = clamp_lanes(load_lanes(x, lanes), activation.low, activation.high);
  const auto finite = static_cast<__mmask16>(lanes & ~_mm512_fpclass_ps_mask(v, kNanOrInfinite));
  low = _mm512_mask_min_ps(low, finite, low, v);
  high = _mm512_mask_max_ps(high, finite, high, v);
}

// Smallest and largest finite value; which zero of several is not said.
template <typename T>
__attribute__((target(CLUSTERQ_AVX512))) void range_lanes(const T* x, int64_t n, const Activation<float>& activation,
                                                          float* smallest, float* largest) {
  // Minimum and maximum take several cycles each: so many are under way at a time.
  constexpr int kChains = 4;
  const ActivationLanes active = activation_lanes(activation);
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512 low[kChains], high[kChains];
  for (int k = 0; k < kChains; ++k) {
    low[k] = infinity;
    high[k] = _mm512_sub_ps(_mm512_setzero_ps(), infinity);
  }
  int64_t i = 0;
  for (; i + 16 * kChains <= n; i += 16 * kChains)
    for (int k = 0; k < kChains; ++k) extend_lanes(x + i + 16 * k, 0xffff, active, low[k], high[k]);
  for (; i < n; i += 16) extend_lanes(x + i, first_lanes(n - i), active, low[0], high[0]);
  for (int k = 1; k < kChains; ++k) {
    low[0] = _mm512_min_ps(low[0], low[k]);
    high[0] = _mm512_max_ps(high[0], high[k]);
  }
  *smallest = _mm512_reduce_min_ps(low[0]);
  *largest = _mm512_reduce_max_ps(high[0]);
}

// The same for every column of rows that lie `stride` elements apart.
template <typename T>
__attribute__((target(CLUSTERQ_AVX512))) void range_rows_lanes(const T* x, int64_t n, int64_t rows, int64_t stride,
                                                               const Activation<float>& activation, float* low,
                                                               float* high) {
  const ActivationLanes active = activation_lanes(activation);
  const auto sixteen = [&](int64_t i, __mmask16 lanes) __attribute__((target(CLUSTERQ_AVX512), always_inline)) {
    __m512 smallest = _mm512_maskz_loadu_ps(lanes, low + i), largest = _mm512_maskz_loadu_ps(lanes, high + i);
    for (int64_t at = i; at < i + rows * stride; at += stride) extend_lanes(x + at, lanes, active, smallest, largest);
    _mm512_mask_storeu_ps(low + i, lanes, smallest);
    _mm512_mask_storeu_ps(high + i, lanes, largest);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sixteen(i, 0xffff);
  if (i < n) sixteen(i, first_lanes(n - i));
}

}  // namespace
}  // namespace clusterq
#endif
