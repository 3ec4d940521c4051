// Memory layouts and dtypes, once for the CPU and the CUDA kernels.
#pragma once

#include <optional>
#include <string>

#include "check.h"

namespace clusterq {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What x is computed in: float64 for float64, else float32.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.stride(d) != b.stride(d)) return false;
  return true;
}

// The wrapped `contiguous` goes through the dispatcher even when there is nothing to do.
inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// x, or a contiguous copy where x leaves gaps in memory: `empty_like` keeps strides exactly when there are none.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || same_strides(torch::stable::empty_like(x), x) ? x : torch::stable::contiguous(x);
}

// grad in the memory order of x, which is dense.
inline Tensor with_strides_of(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  check_same_sizes(grad, x, "grad");
  if (same_strides(grad, x)) return grad;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, grad);
  return copy;
}

// Calls `body` with a value of the element type and one of the arithmetic type; the caller names its 16-bit types.
template <typename BFloat16Type, typename HalfType, typename F>
void for_floating(ScalarType dtype, const char* name, const F& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::BFloat16:
      return body(BFloat16Type{}, float{});
    case ScalarType::Half:
      return body(HalfType{}, float{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace clusterq
