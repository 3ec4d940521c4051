// Memory layouts and dtypes, once for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "numerics.h"

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
  CLUSTERQ_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  check_same_sizes(grad, x, "grad");
  if (same_strides(grad, x)) return grad;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, grad);
  return copy;
}

// An empty tensor with dtype and sizes of x and the strides given.
inline Tensor empty_with_strides(const Tensor& x, const std::vector<int64_t>& stride) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{
      from(x),           from(x.sizes()), from(stride), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether every element has memory of its own and none is left between them.
inline bool fills_memory(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) dimensions.emplace_back(x.stride(d), x.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != reach) return x.numel() == 0;
    reach *= size;
  }
  return true;
}

inline Rule rule_of(const std::string& name) {
  if (name == "codes") return Rule::kCodes;
  if (name == "real") return Rule::kReal;
  CLUSTERQ_CHECK(name == "activation", "rule must be codes, real or activation");
  return Rule::kActivation;
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
      CLUSTERQ_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace clusterq
