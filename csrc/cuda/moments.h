// Moments of samples and how they merge, for host and device compilers. Between chunks everything is float64: a mean
// rounded to float32 may be off by more than the spread of its data.
#pragma once

#include <cmath>
#include <cstdint>

#include "inline.h"

namespace clusterq {

// Mean and sum of squared deviations of one segment and channel, as they pass between kernels.
struct alignas(16) Moments {
  double mean, squares;
};

// Of `count` samples x, `inverse` = 1 / count, from sums of d = x - shift. The shift is a rounded mean of the same
// samples, so that the second sum loses no digits by the correction.
CLUSTERQ_INLINE Moments shifted_moments(double shift, double sum, double squares, double inverse) {
  const double offset = sum * inverse, left = squares - sum * offset;
  // A NaN is not below 0.
  return {shift + offset, left < 0 ? 0 : left};
}

// Chan's rule: `into` of `before` samples and `other`, which makes the part `share` of all.
CLUSTERQ_INLINE void merge_moments(Moments& into, double before, const Moments& other, double share) {
  const double d = other.mean - into.mean;
  into.mean += d * share;
  into.squares += other.squares + d * d * (before * share);
}

// A segment is one of `parts` pieces of an image; all have `part` positions but for the last.
CLUSTERQ_INLINE int64_t part_length(int64_t positions, int64_t part, int64_t index) {
  const int64_t left = positions - index * part;
  return left < part ? left : part;
}

}  // namespace clusterq
