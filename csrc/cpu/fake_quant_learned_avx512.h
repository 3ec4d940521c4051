// The learned backward, written out for AVX-512: masks stay in mask registers, one conversion to double serves both
// sums, and 16-bit gradients are passed on as they are instead of being rounded again. Same bits as `learned_term`.
#pragma once

#include "fake_quant_avx512.h"
#include "fake_quant_sums.h"

#ifdef CLUSTERQ_X86
namespace clusterq {
namespace {

// Sixteen partial sums: of d/d scale, and of the gradients outside the range.
struct LearnedLanes {
  __m512d scale[2], outside[2];
};

template <bool kActivated, typename T>
CLUSTERQ_LANES void learned_sixteen(const T* grad, const T* x, T* grad_x, __mmask16 lanes, const GridLanes& grid,
                                    const ActivationLanes& active, LearnedLanes& sums) {
  const __m512 from = load_lanes(x, lanes), above = load_lanes(grad, lanes);
  const __m512 ratio = _mm512_mul_ps(kActivated ? clamp_lanes(from, active.low, active.high) : from, grid.inverse);
  const __m512 rounded = round_lanes(ratio), bounded = clamp_lanes(rounded, grid.low, grid.high);
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(lanes, rounded, bounded, _CMP_EQ_OQ);
  const __mmask16 outside = _mm512_mask_cmp_ps_mask(lanes, rounded, bounded, _CMP_NEQ_OQ);
  // Without an activation what is infinite is outside already.
  store_kept(grad_x, grad, kActivated ? active_lanes(inside, from, active) : inside, lanes);
  // A NaN takes part in neither sum. Products of two floats are exact in double, fused or not.
  const __mmask16 known = inside | outside;
  const __m512 slope = _mm512_maskz_mov_ps(known, _mm512_mask_sub_ps(bounded, inside, bounded, ratio));
  const __m512 weight = _mm512_maskz_mov_ps(known, above);
  const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(weight));
  const __m512d last = _mm512_cvtps_pd(_mm512_extractf32x8_ps(weight, 1));
  sums.scale[0] = _mm512_fmadd_pd(first, _mm512_cvtps_pd(_mm512_castps512_ps256(slope)), sums.scale[0]);
  sums.scale[1] = _mm512_fmadd_pd(last, _mm512_cvtps_pd(_mm512_extractf32x8_ps(slope, 1)), sums.scale[1]);
  sums.outside[0] = _mm512_mask_add_pd(sums.outside[0], static_cast<__mmask8>(outside), sums.outside[0], first);
  sums.outside[1] = _mm512_mask_add_pd(sums.outside[1], static_cast<__mmask8>(outside >> 8), sums.outside[1], last);
}

// One grid; element i goes into partial sum i % kPartial.
template <bool kActivated, typename T>
__attribute__((target(CLUSTERQ_AVX512))) void learned_run_lanes(const T* grad, const T* x, T* grad_x, int64_t n,
                                                                const OneGrid<float>& grids,
                                                                const Activation<float>& activation,
                                                                double (&scale)[kPartial],
                                                                double (&outside)[kPartial]) {
  static_assert(kPartial == 16);
  const GridLanes grid = grid_lanes(grids, 0, 0xffff);
  const ActivationLanes active = activation_lanes(activation);
  const __m512d zero = _mm512_setzero_pd();
  LearnedLanes sums{{zero, zero}, {zero, zero}};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) learned_sixteen<kActivated>(grad + i, x + i, grad_x + i, 0xffff, grid, active, sums);
  if (i < n) learned_sixteen<kActivated>(grad + i, x + i, grad_x + i, first_lanes(n - i), grid, active, sums);
  for (int half = 0; half < 2; ++half) {
    _mm512_storeu_pd(scale + 8 * half, sums.scale[half]);
    _mm512_storeu_pd(outside + 8 * half, sums.outside[half]);
  }
}

// One grid and one pair of sums per column, both in registers for all of the rows, which lie `stride` elements apart.
template <bool kActivated, typename T>
__attribute__((target(CLUSTERQ_AVX512))) void learned_rows_lanes(const T* grad, const T* x, T* grad_x, int64_t n,
                                                                 int64_t rows, int64_t stride,
                                                                 const GridRow<float>& grids,
                                                                 const Activation<float>& activation, double* scale,
                                                                 double* outside) {
  const ActivationLanes active = activation_lanes(activation);
  const auto sixteen = [&](int64_t i, __mmask16 lanes) __attribute__((target(CLUSTERQ_AVX512), always_inline)) {
    const __mmask8 halves[2] = {static_cast<__mmask8>(lanes), static_cast<__mmask8>(lanes >> 8)};
    const GridLanes grid = grid_lanes(grids, i, lanes);
    LearnedLanes sums;
    for (int half = 0; half < 2; ++half) {
      sums.scale[half] = _mm512_maskz_loadu_pd(halves[half], scale + i + 8 * half);
      sums.outside[half] = _mm512_maskz_loadu_pd(halves[half], outside + i + 8 * half);
    }
    for (int64_t at = i; at < i + rows * stride; at += stride) {
      learned_sixteen<kActivated>(grad + at, x + at, grad_x + at, lanes, grid, active, sums);
    }
    for (int half = 0; half < 2; ++half) {
      _mm512_mask_storeu_pd(scale + i + 8 * half, halves[half], sums.scale[half]);
      _mm512_mask_storeu_pd(outside + i + 8 * half, halves[half], sums.outside[half]);
    }
  };
  int64_t i = 0;
  // A constant mask makes plain loads and stores: a load waits for a masked store to reach the cache.
  for (; i + 16 <= n; i += 16) sixteen(i, 0xffff);
  if (i < n) sixteen(i, first_lanes(n - i));
}

}  // namespace
}  // namespace clusterq
#endif
