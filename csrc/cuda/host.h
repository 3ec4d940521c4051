// What the op functions of the CUDA library need: device and stream of a call, layouts, checks.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "layout.h"
#include "ops.h"
#if defined(CLUSTERQ_EMULATED)
// Of tests/cuda_emulation: tensors of the CPU.
#include <emulated_host.h>
#else
#include <torch/csrc/stable/accelerator.h>
#define CLUSTERQ_KEY CUDA
#endif

namespace clusterq {
namespace {

#if !defined(CLUSTERQ_EMULATED)
// Makes the device of x current for the call and holds the stream that the caller works on.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_device(const Tensor& tensor, const Tensor& x, const char* name) {
  CLUSTERQ_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                 " must be on the device of the data");
}
#endif

inline Element element_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      CLUSTERQ_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline ActivationKind activation_kind(const std::string& name) {
  if (name == "none") return ActivationKind::kNone;
  if (name == "relu") return ActivationKind::kRelu;
  CLUSTERQ_CHECK(name == "relu6", "activation must be none, relu or relu6");
  return ActivationKind::kRelu6;
}

// Channels of the axis of a dense tensor; all of it is one run where there is one channel, whatever its stride.
inline Extent extent_of(const Tensor& x, std::optional<int64_t> axis) {
  Extent extent{x.numel(), 1, x.numel()};
  if (!axis.has_value()) return extent;
  CLUSTERQ_CHECK(*axis >= -x.dim() && *axis < x.dim(), "axis is out of range");
  const int64_t a = *axis < 0 ? *axis + x.dim() : *axis;
  extent.channels = x.size(a);
  if (extent.channels != 1) extent.inner = x.numel() == 0 ? 0 : x.stride(a);
  return extent;
}

// With a parameter of one element or one per channel.
inline Extent extent_of(const Tensor& x, const Tensor& parameter, std::optional<int64_t> axis) {
  if (parameter.numel() == 1) return extent_of(x, std::nullopt);
  CLUSTERQ_CHECK(axis.has_value(), "axis is missing");
  const Extent extent = extent_of(x, axis);
  CLUSTERQ_CHECK(parameter.numel() == extent.channels, "scale has ", parameter.numel(), " elements, wanted 1 or ",
                 extent.channels);
  return extent;
}

inline void check_parameters(const Tensor& x, ScalarType dtype, const Tensor& first, const char* first_name,
                             const Tensor& second, const char* second_name) {
  check_dtype(first, compute_dtype(dtype), first_name);
  check_dtype(second, compute_dtype(dtype), second_name);
  check_numel(second, first.numel(), second_name);
  check_device(first, x, first_name);
  check_device(second, x, second_name);
}

inline GridSource source_of(const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  GridSource source;
  source.codes = {quant_min, quant_max, false};
  source.scale = scale.const_data_ptr();
  source.zero_point = zero_point.const_data_ptr();
  return source;
}

// The wrapped `empty_like` takes no dtype.
inline Tensor empty_like_of(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor new_channels(const Tensor& x, int64_t channels, ScalarType dtype) {
  const std::array<int64_t, 1> sizes{channels};
  return torch::stable::new_empty(x, sizes, dtype);
}

}  // namespace
}  // namespace clusterq
