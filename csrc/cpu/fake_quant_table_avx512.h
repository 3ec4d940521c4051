// The forward from bfloat16 to bfloat16 on a grid of at most 32 codes, 32 elements at a time: the clamp works on the
// bits of x, the code becomes a 16-bit integer, and the value comes out of a register that holds all of them. Two
// thirds of the instructions of the arithmetic on 16 floats, and the same bits.
#pragma once

#include "fake_quant_avx512.h"

#ifdef CLUSTERQ_X86
namespace clusterq {
namespace {

constexpr int kTableCodes = 32;

// The bits of an x with the lowest and of one with the highest code; neither needs to be the outermost of its code.
struct TableEnds {
  uint16_t least, most;
  bool usable;

  explicit TableEnds(const Steps<float>& steps)
      : least(store<BFloat16>(steps.low * steps.scale).bits | uint16_t(0x8000)),
        most(store<BFloat16>(steps.high * steps.scale).bits),
        usable(steps.low <= 0 && steps.high >= 0 && steps.high - steps.low < kTableCodes &&
               code(least, steps) == steps.low && code(most, steps) == steps.high) {}

 private:
  static float code(uint16_t bits, const Steps<float>& steps) {
    return round_even(load<float>(BFloat16{bits}) * steps.inverse);
  }
};

// The value of code c in place c % 32: a permutation reads the lowest five bits of its index.
CLUSTERQ_LANES __m512i table_of(const Steps<float>& steps) {
  static_assert(kTableCodes == 32);
  alignas(64) BFloat16 values[kTableCodes];
  const __m512i low = _mm512_set1_epi32(static_cast<int>(steps.low)), last = _mm512_set1_epi32(kTableCodes - 1);
  for (int first = 0; first < kTableCodes; first += 16) {
    const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(first),
                                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i code = _mm512_add_epi32(_mm512_and_si512(_mm512_sub_epi32(place, low), last), low);
    store_lanes(values + first, _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(steps.scale)), 0xffff);
  }
  return _mm512_load_si512(values);
}

// `ends` are usable ones of the same steps: codes counted from the zero point, with the activation in their bounds.
__attribute__((target(CLUSTERQ_AVX512))) inline void forward_table(const BFloat16* x, BFloat16* y, int64_t n,
                                                                   const Steps<float>& steps, const TableEnds& ends) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 inverse = _mm512_set1_ps(steps.inverse);
  const __m512i values = table_of(steps), zero = _mm512_setzero_si512();
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(ends.least));
  const __m512i most = _mm512_set1_epi16(static_cast<int16_t>(ends.most));
  const __m512i infinity = _mm512_set1_epi16(static_cast<int16_t>(0xff00)), nan = _mm512_set1_epi16(0x7fc0);
  const auto quantized = [&](__m512i v) __attribute__((target(CLUSTERQ_AVX512), always_inline)) {
    // Without its sign, shifted out.
    const __mmask32 number = _mm512_cmple_epu16_mask(_mm512_slli_epi16(v, 1), infinity);
    // As signed integers, positive numbers are in order above all negative ones; as unsigned, negative ones above all
    // positive ones.
    v = _mm512_min_epu16(_mm512_min_epi16(v, most), least);
    // A bfloat16 is the upper half of a float. Packing undoes what unpacking does to the order.
    const __m512 even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, v));
    const __m512 odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, v));
    const __m512i code = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(_mm512_mul_ps(even, inverse), kNearest),
                                            _mm512_cvt_roundps_epi32(_mm512_mul_ps(odd, inverse), kNearest));
    return _mm512_mask_permutexvar_epi16(nan, number, code, values);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(y + i, quantized(_mm512_loadu_si512(x + i)));
  if (i == n) return;
  const auto rest = static_cast<__mmask32>((1u << (n - i)) - 1);
  _mm512_mask_storeu_epi16(y + i, rest, quantized(_mm512_maskz_loadu_epi16(rest, x + i)));
}

}  // namespace
}  // namespace clusterq
#endif
