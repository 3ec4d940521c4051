// The forward of one grid from bfloat16 to bfloat16, for CPUs that round to bfloat16 themselves: half the instructions
// of the portable loop, whose rounding is integer arithmetic.
#pragma once

#include "fake_quant.h"
#include "lanes_avx512.h"

#ifdef CLUSTERQ_X86

namespace clusterq {
namespace {

// The instruction takes subnormal numbers for 0. A value is 0 or at least one step, so a step above them is enough;
// in bfloat16 it may round to one below 2^-125.
inline bool rounds_exactly(const Grid<float>& grid) { return grid.scale >= 0x1p-125f && has_avx512_bf16(); }

__attribute__((target(CLUSTERQ_AVX512_BF16))) inline void forward_bfloat16(const BFloat16* x, BFloat16* y, int64_t n,
                                                                           const Steps<float>& steps) {
  const __m512 inverse = _mm512_set1_ps(steps.inverse), scale = _mm512_set1_ps(steps.scale);
  const __m512 low = _mm512_set1_ps(steps.low), high = _mm512_set1_ps(steps.high), zero = _mm512_setzero_ps();
  const auto quantized = [&](__m256i half) __attribute__((target(CLUSTERQ_AVX512_BF16), always_inline)) {
    const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    const __m512 rounded = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT);
    // Maximum and minimum return their second operand for a NaN; adding 0 turns -0 into +0.
    return _mm512_mul_ps(_mm512_add_ps(_mm512_min_ps(high, _mm512_max_ps(low, rounded)), zero), scale);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 first = quantized(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
    const __m512 second = quantized(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 16)));
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(y + i, &both, sizeof(both));
  }
  for (; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m256bh last = _mm512_cvtneps_pbh(quantized(_mm256_maskz_loadu_epi16(lanes, x + i)));
    __m256i bits;
    std::memcpy(&bits, &last, sizeof(bits));
    _mm256_mask_storeu_epi16(y + i, lanes, bits);
  }
}

}  // namespace
}  // namespace clusterq

#endif
