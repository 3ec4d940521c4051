// The masked forward, written out for AVX-512: a comparison there leaves the sixteen bits of the mask in a register,
// where compilers make a byte for each element first. Same bits as `masked_quantize`.
#pragma once

#include "fake_quant_avx512.h"

#ifdef CLUSTERQ_X86
namespace clusterq {
namespace {

// Writes ceil(n / 8) bytes of the mask, unused bits 0.
template <Rule kRule, typename T, typename G>
__attribute__((target(CLUSTERQ_AVX512))) void masked_lanes(const T* x, T* y, uint8_t* mask, int64_t n, const G& grids,
                                                           const Activation<float>& activation) {
  const ActivationLanes active = activation_lanes(activation);
  const auto prepare = [](const GridLanes& grid) CLUSTERQ_LANES_LAMBDA { return grid; };
  for_lanes(n, grids, prepare, [&](int64_t i, __mmask16 lanes, const GridLanes& grid) CLUSTERQ_LANES_LAMBDA {
    const __m512 from = load_lanes(x + i, lanes), v = clamp_lanes(from, active.low, active.high);
    const __m512 rounded = round_lanes(_mm512_mul_ps(v, grid.inverse));
    const __m512 bounded = clamp_lanes(rounded, grid.low, grid.high);
    __mmask16 inside = active_lanes(lanes, from, active);
    if constexpr (kRule == Rule::kCodes) inside = _mm512_mask_cmp_ps_mask(inside, rounded, bounded, _CMP_EQ_OQ);
    if constexpr (kRule == Rule::kReal) {
      inside = _mm512_mask_cmp_ps_mask(inside, v, _mm512_mul_ps(grid.low, grid.scale), _CMP_GE_OQ);
      inside = _mm512_mask_cmp_ps_mask(inside, v, _mm512_mul_ps(grid.high, grid.scale), _CMP_LE_OQ);
    }
    // Adding 0 turns -0 into +0.
    store_lanes(y + i, _mm512_mul_ps(_mm512_add_ps(bounded, _mm512_setzero_ps()), grid.scale), lanes);
    const auto bits = static_cast<uint16_t>(inside);
    std::memcpy(mask + i / 8, &bits, lanes > 0xff ? 2 : 1);
  });
}

}  // namespace
}  // namespace clusterq
#endif
