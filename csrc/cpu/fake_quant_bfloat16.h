// The forward from bfloat16 to bfloat16, for CPUs that round to bfloat16 themselves: half the instructions of the
// portable loop, whose rounding is integer arithmetic.
#pragma once

#include "fake_quant_avx512.h"

#ifdef CLUSTERQ_X86

namespace clusterq {
namespace {

// The instruction takes subnormal numbers for 0. A value is 0 or at least one step, so a step above them is enough;
// in bfloat16 it may round to one below 2^-125.
inline bool rounds_exactly(float least_scale) { return least_scale >= 0x1p-125f && has_avx512_bf16(); }

__attribute__((target(CLUSTERQ_AVX512_BF16), always_inline)) inline void store_rounded(BFloat16* y, __m512 v,
                                                                                       __mmask16 lanes) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  _mm256_mask_storeu_epi16(y, lanes, bits);
}

__attribute__((target(CLUSTERQ_AVX512_BF16))) inline void forward_bfloat16(const BFloat16* x, BFloat16* y, int64_t n,
                                                                           const OneGrid<float>& one,
                                                                           const Activation<float>& activation) {
  const GridLanes grid = folded(grid_lanes(one, 0, 0xffff), activation_lanes(activation));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 first = quantized_lanes(load_lanes(x + i, 0xffff), grid);
    const __m512 second = quantized_lanes(load_lanes(x + i + 16, 0xffff), grid);
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(y + i, &both, sizeof(both));
  }
  for (; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    store_rounded(y + i, quantized_lanes(load_lanes(x + i, lanes), grid), lanes);
  }
}

// The walk of `for_lanes`, which code for less than this instruction set cannot be inlined into.
__attribute__((target(CLUSTERQ_AVX512_BF16))) inline void forward_bfloat16(const BFloat16* x, BFloat16* y, int64_t n,
                                                                           const GridRow<float>& row,
                                                                           const Activation<float>& activation) {
  const ActivationLanes active = activation_lanes(activation);
  for (int64_t column = 0; column < std::min(n, row.period); column += 16) {
    const GridLanes grid = folded(grid_lanes(row, column, first_lanes(n - column)), active);
    int64_t i = column;
    for (; i + 16 <= n; i += row.period)
      store_rounded(y + i, quantized_lanes(load_lanes(x + i, 0xffff), grid), 0xffff);
    if (i >= n) continue;
    const __mmask16 lanes = first_lanes(n - i);
    store_rounded(y + i, quantized_lanes(load_lanes(x + i, lanes), grid), lanes);
  }
}

}  // namespace
}  // namespace clusterq

#endif
