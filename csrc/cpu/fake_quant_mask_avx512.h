// The masked forward of one grid, written out for AVX-512: a comparison there leaves the sixteen bits of the mask in a
// register, where compilers make a byte for each element first. Same bits as `masked_quantize`.
#pragma once

#include "fake_quant.h"
#include "lanes_avx512.h"

#ifdef CLUSTERQ_X86
namespace clusterq {
namespace {

// Writes ceil(n / 8) bytes of the mask, unused bits 0. Maximum and minimum return their second operand for a NaN.
template <Rule kRule, typename T>
__attribute__((target(CLUSTERQ_AVX512))) void masked_lanes(const T* x, T* y, uint8_t* mask, int64_t n,
                                                           const Grid<float>& grid,
                                                           const Activation<float>& activation) {
  const __m512 inverse = _mm512_set1_ps(grid.inverse), scale = _mm512_set1_ps(grid.scale);
  const float least = grid.quant_min - grid.zero_point, most = grid.quant_max - grid.zero_point;
  const __m512 low = _mm512_set1_ps(least), high = _mm512_set1_ps(most);
  const __m512 real_low = _mm512_set1_ps(least * grid.scale), real_high = _mm512_set1_ps(most * grid.scale);
  const __m512 active_low = _mm512_set1_ps(activation.low), active_high = _mm512_set1_ps(activation.high);
  const auto sixteen = [&](int64_t i, __mmask16 lanes) __attribute__((target(CLUSTERQ_AVX512), always_inline)) {
    const __m512 from = load_lanes(x + i, lanes);
    const __m512 v = _mm512_min_ps(active_high, _mm512_max_ps(active_low, from));
    const __m512 rounded = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT);
    const __m512 bounded = _mm512_min_ps(high, _mm512_max_ps(low, rounded));
    __mmask16 inside = _mm512_mask_cmp_ps_mask(lanes, from, active_low, _CMP_GT_OQ);
    inside = _mm512_mask_cmp_ps_mask(inside, from, active_high, _CMP_LT_OQ);
    if constexpr (kRule == Rule::kCodes) inside = _mm512_mask_cmp_ps_mask(inside, rounded, bounded, _CMP_EQ_OQ);
    if constexpr (kRule == Rule::kReal) {
      inside = _mm512_mask_cmp_ps_mask(inside, v, real_low, _CMP_GE_OQ);
      inside = _mm512_mask_cmp_ps_mask(inside, v, real_high, _CMP_LE_OQ);
    }
    // Adding 0 turns -0 into +0.
    store_lanes(y + i, _mm512_mul_ps(_mm512_add_ps(bounded, _mm512_setzero_ps()), scale), lanes);
    return static_cast<uint16_t>(inside);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint16_t bits = sixteen(i, 0xffff);
    std::memcpy(mask + i / 8, &bits, 2);
  }
  if (i == n) return;
  const uint16_t bits = sixteen(i, static_cast<__mmask16>((1u << (n - i)) - 1));
  std::memcpy(mask + i / 8, &bits, n - i > 8 ? 2 : 1);
}

}  // namespace
}  // namespace clusterq
#endif
