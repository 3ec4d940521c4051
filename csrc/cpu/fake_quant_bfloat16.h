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

template <typename G>
__attribute__((target(CLUSTERQ_AVX512_BF16))) void forward_bfloat16(const BFloat16* x, BFloat16* y, int64_t n,
                                                                    const G& grids,
                                                                    const Activation<float>& activation) {
  const ActivationLanes active = activation_lanes(activation);
  const auto prepare = [&](const GridLanes& grid) CLUSTERQ_LANES_LAMBDA { return folded(grid, active); };
  // Not always_inline: `for_lanes` itself is compiled for less than this instruction set.
  for_lanes(n, grids, prepare,
            [&](int64_t i, __mmask16 lanes, const GridLanes& grid) __attribute__((target(CLUSTERQ_AVX512_BF16))) {
              store_rounded(y + i, quantized_lanes(load_lanes(x + i, lanes), grid), lanes);
            });
}

}  // namespace
}  // namespace clusterq

#endif
