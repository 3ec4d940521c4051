// The formulas of fake-quantization, once for host and device compilers. `A` is float, or double for double inputs.
// Comparisons are written so that a NaN fails every mask and survives every clamp. Kernels must be compiled without
// contraction to fma (-ffp-contract=off, --fmad=false): the codes of all backends agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define CLUSTERQ_INLINE __host__ __device__ __forceinline__
#else
// Plain `inline` helpers are not cloned along with a `target_clones` caller: they have to vanish into it.
#define CLUSTERQ_INLINE inline __attribute__((always_inline))
#endif

namespace clusterq {

// Uniform grid (code - zero_point) * scale with code in [quant_min, quant_max]; inverse = 1 / scale.
template <typename A>
struct Grid {
  A scale, inverse, zero_point, quant_min, quant_max;
};

// Bounds of an activation: (-inf, inf) for none, (0, inf) for relu, (0, 6) for relu6.
template <typename A>
struct Activation {
  A low, high;
};

// Half to even.
#if defined(__CUDA_ARCH__)
CLUSTERQ_INLINE float round_even(float v) { return ::rintf(v); }
CLUSTERQ_INLINE double round_even(double v) { return ::rint(v); }
#else
CLUSTERQ_INLINE float round_even(float v) { return __builtin_nearbyintf(v); }
CLUSTERQ_INLINE double round_even(double v) { return __builtin_nearbyint(v); }
#endif

template <typename A>
CLUSTERQ_INLINE A clamp(A v, A low, A high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Unclamped code of an activated value.
template <typename A>
CLUSTERQ_INLINE A shifted(A ratio, const Grid<A>& grid) {
  return round_even(ratio) + grid.zero_point;
}

template <typename A>
CLUSTERQ_INLINE A fake_quantize(A v, const Grid<A>& grid) {
  const A code = clamp(shifted(v * grid.inverse, grid), grid.quant_min, grid.quant_max);
  return (code - grid.zero_point) * grid.scale;
}

// The code itself; a NaN gets the code of 0.0.
template <typename A>
CLUSTERQ_INLINE A quantize(A v, const Grid<A>& grid) {
  const A q = shifted(v * grid.inverse, grid);
  return clamp(q == q ? q : grid.zero_point, grid.quant_min, grid.quant_max);
}

// Whether the gradient of y reaches x, the input before its activation.
template <typename A>
CLUSTERQ_INLINE bool passes(A x, const Grid<A>& grid, const Activation<A>& activation) {
  const A q = shifted(clamp(x, activation.low, activation.high) * grid.inverse, grid);
  return (q >= grid.quant_min) & (q <= grid.quant_max) & (x > activation.low) & (x < activation.high);
}

// What one element adds to the gradients of the learned parameters, per unit of grad:
// dS += grad * slope, dZ -= grad * scale where outside. Both nothing for a NaN.
template <typename A>
struct LearnedTerm {
  A slope;
  bool passes, outside;
};

template <typename A>
CLUSTERQ_INLINE LearnedTerm<A> learned_term(A x, const Grid<A>& grid, const Activation<A>& activation) {
  const A ratio = clamp(x, activation.low, activation.high) * grid.inverse;
  const A rounded = round_even(ratio);
  const A q = rounded + grid.zero_point;
  const bool below = q<grid.quant_min, above = q> grid.quant_max;
  const bool inside = (q >= grid.quant_min) & (q <= grid.quant_max);
  A slope = inside ? rounded - ratio : A(0);
  slope = below ? grid.quant_min - grid.zero_point : slope;
  slope = above ? grid.quant_max - grid.zero_point : slope;
  return {slope, bool(inside & (x > activation.low) & (x < activation.high)), bool(below | above)};
}

// Scale and zero point of the range [low, high], extended to contain 0; low > high: nothing finite was seen.
template <typename A>
CLUSTERQ_INLINE Grid<A> range_to_grid(A low, A high, int64_t quant_min, int64_t quant_max, bool symmetric) {
  const A smallest = std::numeric_limits<A>::min();
  const A qmin = static_cast<A>(quant_min), qmax = static_cast<A>(quant_max);
  const A steps = static_cast<A>(quant_max - quant_min);
  const bool empty = low > high;
  low = low > A(0) ? A(0) : low;
  high = high < A(0) ? A(0) : high;
  // Halved first: the same bits as (high - low) / steps, without overflow.
  A scale = symmetric ? (-low > high ? -low : high) / (steps * A(0.5)) : (high * A(0.5) - low * A(0.5)) / steps * A(2);
  scale = (empty | (scale < smallest)) ? A(1) : scale;
  A zero_point = clamp(qmin - round_even(low / scale), qmin, qmax);
  zero_point = empty ? clamp(A(0), qmin, qmax) : zero_point;
  // -0.5 rounds to -0; adding 0 makes it +0.
  zero_point = symmetric ? round_even((qmin + qmax) * A(0.5)) + A(0) : zero_point;
  return {scale, A(1) / scale, zero_point, qmin, qmax};
}

// New running bound; `first`: nothing was seen before, `seen`: there is something to see now.
template <typename A>
CLUSTERQ_INLINE A moved_bound(A running, A now, double momentum, bool first, bool seen) {
  const A updated = first ? now : static_cast<A>(momentum) * running + static_cast<A>(1 - momentum) * now;
  return seen ? updated : running;
}

}  // namespace clusterq
