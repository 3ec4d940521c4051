// The elementwise fake-quantize ops of CUDA tensors, and the learned backward: checks, outputs, launches.
#include <tuple>

#include "host.h"

namespace clusterq {
namespace {

Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
               std::optional<int64_t> axis, std::string activation) {
  check_parameters(input, input.scalar_type(), scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor x = dense(input), s = packed(scale), z = packed(zero_point);
  const Tensor out = torch::stable::empty_like(x);
  const Extent extent = extent_of(x, scale, axis);
  const ActivationKind kind = activation_kind(activation);
  const Element element = element_of(x.scalar_type(), "x");
  if (extent.numel == 0) return out;
  launch_fake_quantize(element, x.const_data_ptr(), out.mutable_data_ptr(), extent,
                       source_of(s, z, quant_min, quant_max), kind, false, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, std::string activation) {
  check_parameters(input, input.scalar_type(), scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor x = dense(input), grad = with_strides_of(grad_output, x), s = packed(scale), z = packed(zero_point);
  check_device(grad, x, "grad");
  const Tensor out = torch::stable::empty_like(x);
  const Extent extent = extent_of(x, scale, axis);
  const ActivationKind kind = activation_kind(activation);
  const Element element = element_of(x.scalar_type(), "x");
  if (extent.numel == 0) return out;
  launch_fake_quantize_backward(element, grad.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(), extent,
                                source_of(s, z, quant_min, quant_max), kind, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> learned_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                                    std::optional<int64_t> axis, std::string activation) {
  check_parameters(input, input.scalar_type(), scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor x = dense(input), grad = with_strides_of(grad_output, x), s = packed(scale), z = packed(zero_point);
  check_device(grad, x, "grad");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_scale = torch::stable::empty_like(s), grad_zero = torch::stable::empty_like(z);
  const Extent extent = extent_of(x, scale, axis);
  const ActivationKind kind = activation_kind(activation);
  const Element element = element_of(x.scalar_type(), "x");
  if (extent.numel == 0) {
    torch::stable::zero_(grad_scale);
    torch::stable::zero_(grad_zero);
    return {grad_x, grad_scale, grad_zero};
  }
  const auto is_aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const LearnedPlan plan = plan_learned(
      element, extent,
      is_aligned(x.const_data_ptr()) && is_aligned(grad.const_data_ptr()) && is_aligned(grad_x.const_data_ptr()));
  const Tensor partial = new_channels(x, 2 * plan.splits * plan.sums, ScalarType::Double);
  launch_learned_backward(element, plan, grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(),
                          static_cast<double*>(partial.mutable_data_ptr()), grad_scale.mutable_data_ptr(),
                          grad_zero.mutable_data_ptr(), extent, source_of(s, z, quant_min, quant_max), kind,
                          launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_scale, grad_zero};
}

int code_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::Short:
      return 2;
    case ScalarType::Int:
      return 4;
    default:
      CLUSTERQ_CHECK(false, "codes must be uint8, int8, int16 or int32");
  }
}

ScalarType code_dtype(int64_t quant_min, int64_t quant_max) {
  if (quant_min >= 0 && quant_max <= 255) return ScalarType::Byte;
  if (quant_min >= -128 && quant_max <= 127) return ScalarType::Char;
  if (quant_min >= -32768 && quant_max <= 32767) return ScalarType::Short;
  return ScalarType::Int;
}

Tensor quantize_codes(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                      int64_t quant_max, std::optional<int64_t> axis) {
  check_parameters(input, input.scalar_type(), scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor x = dense(input), s = packed(scale), z = packed(zero_point);
  const ScalarType dtype = code_dtype(quant_min, quant_max);
  const Tensor codes = empty_like_of(x, dtype);
  const Extent extent = extent_of(x, scale, axis);
  const Element element = element_of(x.scalar_type(), "x");
  if (extent.numel == 0) return codes;
  launch_quantize(element, x.const_data_ptr(), codes.mutable_data_ptr(), code_bytes(dtype), extent,
                  source_of(s, z, quant_min, quant_max), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return codes;
}

Tensor dequantize_codes(const Tensor& input, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
                        ScalarType dtype) {
  check_parameters(input, dtype, scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor codes = dense(input), s = packed(scale), z = packed(zero_point);
  const Tensor y = empty_like_of(codes, dtype);
  const Extent extent = extent_of(codes, scale, axis);
  const Element element = element_of(dtype, "dtype");
  const int bytes = code_bytes(codes.scalar_type());
  if (extent.numel == 0) return y;
  launch_dequantize(element, codes.const_data_ptr(), bytes, codes.scalar_type() == ScalarType::Char,
                    y.mutable_data_ptr(), extent, source_of(s, z, 0, 0), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

std::vector<std::string> fake_quant_ops() {
  return {"fake_quantize", "fake_quantize_backward", "fake_quantize_learned_backward", "quantize", "dequantize"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("fake_quantize", TORCH_BOX(&clusterq::forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&clusterq::backward));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&clusterq::learned_backward));
  m.impl("quantize", TORCH_BOX(&clusterq::quantize_codes));
  m.impl("dequantize", TORCH_BOX(&clusterq::dequantize_codes));
}
