// The formulas of fake-quantization, once for host and device compilers. `A` is float, or double for double inputs.
// Comparisons are written so that a NaN fails every mask and survives every clamp. Kernels must be compiled without
// contraction to fma (-ffp-contract=off, --fmad=false): the codes of all backends agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "inline.h"

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

// The same value with codes counted from the zero point and the activation folded into their bounds: both clamps are
// monotone, all whole numbers here are exact, so the bits are those of `fake_quantize` after the activation.
template <typename A>
struct Steps {
  A scale, inverse, low, high;
};

template <typename A>
CLUSTERQ_INLINE Steps<A> to_steps(const Grid<A>& grid, const Activation<A>& activation) {
  const A low = grid.quant_min - grid.zero_point, high = grid.quant_max - grid.zero_point;
  return {grid.scale, grid.inverse, clamp(round_even(activation.low * grid.inverse), low, high),
          clamp(round_even(activation.high * grid.inverse), low, high)};
}

template <typename A>
CLUSTERQ_INLINE A fake_quantize(A x, const Steps<A>& steps) {
  // Adding 0 turns -0 into +0.
  return (clamp(round_even(x * steps.inverse), steps.low, steps.high) + A(0)) * steps.scale;
}

// The code itself; a NaN gets the code of 0.0.
template <typename A>
CLUSTERQ_INLINE A quantize(A v, const Grid<A>& grid) {
  const A q = shifted(v * grid.inverse, grid);
  return clamp(q == q ? q : grid.zero_point, grid.quant_min, grid.quant_max);
}

// Gradient with respect to x, the input before its activation: grad or 0. Selects of values, one after the other: with
// masks combined as bools GCC 12 does not vectorise the loop.
template <typename A>
CLUSTERQ_INLINE A masked_gradient(A x, A grad, const Grid<A>& grid, const Activation<A>& activation) {
  const A q = shifted(clamp(x, activation.low, activation.high) * grid.inverse, grid);
  A inside = q >= grid.quant_min ? grad : A(0);
  inside = q <= grid.quant_max ? inside : A(0);
  inside = x > activation.low ? inside : A(0);
  return x < activation.high ? inside : A(0);
}

// Which elements the gradient reaches, besides activation'(x) != 0: those whose code lies in the range, those that lie
// in the real range between the outermost codes, or all finite ones.
enum class Rule { kCodes, kReal, kActivation };

// The quantized value, and 1 where the gradient reaches x, else 0.
template <typename A>
struct Masked {
  A value, inside;
};

template <Rule kRule, typename A>
CLUSTERQ_INLINE Masked<A> masked_quantize(A x, const Grid<A>& grid, const Activation<A>& activation) {
  const A low = grid.quant_min - grid.zero_point, high = grid.quant_max - grid.zero_point;
  const A v = clamp(x, activation.low, activation.high);
  const A rounded = round_even(v * grid.inverse);
  const A bounded = clamp(rounded, low, high);
  A inside = A(1);
  if (kRule == Rule::kCodes) inside = rounded == bounded ? inside : A(0);
  if (kRule == Rule::kReal) {
    inside = v >= low * grid.scale ? inside : A(0);
    inside = v <= high * grid.scale ? inside : A(0);
  }
  inside = x > activation.low ? inside : A(0);
  inside = x < activation.high ? inside : A(0);
  return {(bounded + A(0)) * grid.scale, inside};
}

// The same mask as two tests, for kernels that keep no rule in their code: first <= x <= last, and the code in the
// range unless `any_code`.
template <typename A>
struct Pass {
  A first, last;
};

// Of the activation and the rule, before any grid is known. An activation lets through what lies strictly within its
// bounds, as far as these are finite.
template <typename A>
inline Pass<A> to_pass(const Activation<A>& activation, Rule rule) {
  constexpr A inf = std::numeric_limits<A>::infinity(), largest = std::numeric_limits<A>::max();
  Pass<A> pass{activation.low > -inf ? std::nextafter(activation.low, inf) : -inf,
               activation.high < inf ? std::nextafter(activation.high, -inf) : inf};
  if (rule != Rule::kActivation) return pass;
  return {pass.first < -largest ? -largest : pass.first, pass.last > largest ? largest : pass.last};
}

// Narrowed to the values of the outermost codes.
template <typename A>
CLUSTERQ_INLINE Pass<A> to_real(const Pass<A>& pass, const Grid<A>& grid) {
  const A low = (grid.quant_min - grid.zero_point) * grid.scale, high = (grid.quant_max - grid.zero_point) * grid.scale;
  return {low > pass.first ? low : pass.first, high < pass.last ? high : pass.last};
}

// `ratio` is the rounded x / scale, before the activation: where that matters, `pass` fails.
template <typename A>
CLUSTERQ_INLINE bool passes(A x, A ratio, const Steps<A>& steps, const Pass<A>& pass, bool any_code) {
  return (any_code | (clamp(ratio, steps.low, steps.high) == ratio)) & (x >= pass.first) & (x <= pass.last);
}

// What one element contributes: dX = x, dS += grad * slope, dZ -= outside * scale; all of them 0 for a NaN.
template <typename A>
struct LearnedTerm {
  A x, grad, slope, outside;
};

template <typename A>
CLUSTERQ_INLINE LearnedTerm<A> learned_term(A x, A grad, const Grid<A>& grid, const Activation<A>& activation) {
  const A ratio = clamp(x, activation.low, activation.high) * grid.inverse;
  const A rounded = round_even(ratio);
  const A bounded = clamp(rounded, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point);
  const A known = rounded == rounded ? grad : A(0);
  const A slope = bounded - (rounded == bounded ? ratio : A(0));
  const A outside = rounded != bounded ? known : A(0);
  A inside = rounded == bounded ? grad : A(0);
  inside = x > activation.low ? inside : A(0);
  inside = x < activation.high ? inside : A(0);
  return {inside, known, rounded == rounded ? slope : A(0), outside};
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
