// Sixteen floats at a time, written out for AVX-512 where the compiler's own vector code falls behind.
#pragma once

#include "simd.h"

#ifdef CLUSTERQ_X86

// GCC 12 takes the undefined lanes of its own header for uninitialised variables, wherever they are inlined: to the end
// of the file that includes this.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define CLUSTERQ_AVX512_BF16 CLUSTERQ_AVX512 ",avx512bf16"

namespace clusterq {
namespace {

#define CLUSTERQ_LANES __attribute__((target(CLUSTERQ_AVX512), always_inline)) inline

CLUSTERQ_LANES __m512 load_lanes(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
CLUSTERQ_LANES __m512 load_lanes(const BFloat16* x, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}
CLUSTERQ_LANES __m512 load_lanes(const Half* x, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}

CLUSTERQ_LANES void store_lanes(float* y, __m512 v, __mmask16 lanes) { _mm512_mask_storeu_ps(y, lanes, v); }
CLUSTERQ_LANES void store_lanes(BFloat16* y, __m512 v, __mmask16 lanes) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(y, lanes, _mm512_cvtepi32_epi16(rounded));
}
CLUSTERQ_LANES void store_lanes(Half* y, __m512 v, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(y, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace clusterq
#endif
