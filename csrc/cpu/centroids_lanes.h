// One register of floats of an instruction set, CLUSTERQ_FLOATS of them. Included by centroids_kernel.h, once per
// level; no include guard on purpose.

namespace CLUSTERQ_LEVEL {

constexpr int kLanes = CLUSTERQ_FLOATS;

#if CLUSTERQ_FLOATS == 16
using Floats = __m512;
CLUSTERQ_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
CLUSTERQ_INLINE Floats fill(float v) { return _mm512_set1_ps(v); }
CLUSTERQ_INLINE void save(float* p, Floats v) { _mm512_storeu_ps(p, v); }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
CLUSTERQ_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
CLUSTERQ_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
CLUSTERQ_INLINE float largest(Floats v) { return _mm512_reduce_max_ps(v); }
CLUSTERQ_INLINE float total(Floats v) { return _mm512_reduce_add_ps(v); }
CLUSTERQ_INLINE unsigned at_least(Floats v, Floats least) { return _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ); }
#elif CLUSTERQ_FLOATS == 8
using Floats = __m256;
CLUSTERQ_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
CLUSTERQ_INLINE Floats fill(float v) { return _mm256_set1_ps(v); }
CLUSTERQ_INLINE void save(float* p, Floats v) { _mm256_storeu_ps(p, v); }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
CLUSTERQ_INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
CLUSTERQ_INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
CLUSTERQ_INLINE float largest(Floats v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
CLUSTERQ_INLINE float total(Floats v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
CLUSTERQ_INLINE unsigned at_least(Floats v, Floats least) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ)));
}
#else
typedef float Floats __attribute__((vector_size(16), may_alias));
typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
CLUSTERQ_INLINE Floats load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
CLUSTERQ_INLINE Floats fill(float v) { return Floats{v, v, v, v}; }
CLUSTERQ_INLINE void save(float* p, Floats v) { *reinterpret_cast<Unaligned*>(p) = v; }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
CLUSTERQ_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
CLUSTERQ_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
CLUSTERQ_INLINE float largest(Floats v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
CLUSTERQ_INLINE float total(Floats v) { return (v[0] + v[1]) + (v[2] + v[3]); }
CLUSTERQ_INLINE unsigned at_least(Floats v, Floats least) {
  const auto found = v >= least;
  return (found[0] & 1) | (found[1] & 2) | (found[2] & 4) | (found[3] & 8);
}
#endif

}  // namespace CLUSTERQ_LEVEL
