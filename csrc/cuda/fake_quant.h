// What the fake-quantize kernels share: where the grid of a channel comes from.
#pragma once

#include "device.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256;

// Given scales and zero points.
template <typename A>
struct Parameters {
  // The reciprocal of a double is a subroutine.
  static constexpr bool kDivides = sizeof(A) == 8;
  const A *scale, *zero_point;
  A quant_min, quant_max;

  __device__ __forceinline__ Grid<A> grid(int64_t channel) const {
    const A s = scale[channel];
    return {s, reciprocal(s), zero_point[channel], quant_min, quant_max};
  }
  __device__ __forceinline__ void publish(int64_t) const {}
};

// Scales and zero points of running ranges; one block writes them.
template <typename A>
struct RangeParameters {
  static constexpr bool kDivides = true;
  const A *low, *high;
  A *scale, *zero_point;
  int quant_min, quant_max;
  bool symmetric;

  __device__ __forceinline__ Grid<A> grid(int64_t channel) const {
    return range_to_grid(low[channel], high[channel], quant_min, quant_max, symmetric);
  }
  __device__ __forceinline__ void publish(int64_t channels) const {
    if (blockIdx.x != 0) return;
    for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
      const Grid<A> found = grid(c);
      scale[c] = found.scale;
      zero_point[c] = found.zero_point;
    }
  }
};

template <typename A>
Parameters<A> given(const GridSource& source) {
  return {static_cast<const A*>(source.scale), static_cast<const A*>(source.zero_point),
          static_cast<A>(source.codes.quant_min), static_cast<A>(source.codes.quant_max)};
}

template <typename A>
RangeParameters<A> of_range(const GridSource& source) {
  return {static_cast<const A*>(source.low),
          static_cast<const A*>(source.high),
          static_cast<A*>(source.to_scale),
          static_cast<A*>(source.to_zero_point),
          static_cast<int>(source.codes.quant_min),
          static_cast<int>(source.codes.quant_max),
          source.codes.symmetric};
}

}  // namespace
}  // namespace clusterq
