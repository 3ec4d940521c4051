// What the fake-quantize kernels share: parameters per channel, the walk over dense memory, checks.
#pragma once

#include "launch.h"
#include "ops.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256;

template <typename A>
struct Parameters {
  const A *scale, *zero_point;
  A quant_min, quant_max;

  __device__ __forceinline__ Grid<A> grid(int64_t channel) const {
    const A s = scale[channel];
    return {s, reciprocal(s), zero_point[channel], quant_min, quant_max};
  }
};

// Dense memory seen as [outer, channels, inner]; [1, 1, numel] for one scale.
struct Walk {
  int64_t outer = 1, channels = 1, inner = 1;

  Walk(const Tensor& x, const Tensor& scale, std::optional<int64_t> axis) {
    channels = scale.numel();
    inner = x.numel();
    if (channels != 1) {
      STD_TORCH_CHECK(axis.has_value() && *axis >= -x.dim() && *axis < x.dim(), "axis is missing or out of range");
      const int64_t a = *axis < 0 ? *axis + x.dim() : *axis;
      STD_TORCH_CHECK(x.size(a) == channels, "scale has ", channels, " elements, wanted 1 or ", x.size(a));
      inner = x.numel() == 0 ? 0 : x.stride(a);
    }
    outer = x.numel() == 0 ? 0 : x.numel() / (channels * inner);
  }
};

template <typename A>
Activation<A> activation_of(const std::string& name) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  if (name == "none") return {-inf, inf};
  if (name == "relu") return {A(0), inf};
  STD_TORCH_CHECK(name == "relu6", "activation must be none, relu or relu6");
  return {A(0), A(6)};
}

template <typename A>
Parameters<A> parameters_of(const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  return {static_cast<const A*>(scale.const_data_ptr()), static_cast<const A*>(zero_point.const_data_ptr()),
          static_cast<A>(quant_min), static_cast<A>(quant_max)};
}

inline void check_parameters(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  const ScalarType dtype = compute_dtype(x.scalar_type());
  check_dtype(scale, dtype, "scale");
  check_dtype(zero_point, dtype, "zero_point");
  check_numel(zero_point, scale.numel(), "zero_point");
  check_device(scale, x, "scale");
  check_device(zero_point, x, "zero_point");
}

}  // namespace
}  // namespace clusterq
