// The fake-quantize ops of CUDA tensors that find ranges or save masks: checks, outputs, launches.
#include <tuple>

#include "host.h"

namespace clusterq {
namespace {

Tensor new_mask(const Tensor& x) { return new_channels(x, ceil_div(x.numel(), 8), ScalarType::Byte); }

// Scratch of a range launch. Where the library has none to give, it is cleared by a launch before: always right.
struct Scratch {
  RangeScratch range;
  Tensor words;
  Scratch(const Tensor& x, Element element, int64_t channels, cudaStream_t stream) {
    const int64_t wanted = range_words(element, channels);
    range.reserved = reserve_range_words(x.get_device_index(), stream, wanted);
    if (range.reserved >= 0) return;
    const std::array<int64_t, 1> sizes{wanted};
    words = torch::stable::new_zeros(x, sizes, ScalarType::Int);
    range.words = static_cast<uint32_t*>(words.mutable_data_ptr());
  }
};

std::tuple<Tensor, Tensor> masked(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                                  int64_t quant_max, std::optional<int64_t> axis, std::string activation,
                                  std::string rule) {
  check_parameters(input, input.scalar_type(), scale, "scale", zero_point, "zero_point");
  const Launch launch(input);
  const Tensor x = dense(input), s = packed(scale), z = packed(zero_point);
  const Tensor y = torch::stable::empty_like(x), mask = new_mask(x);
  const Extent extent = extent_of(x, scale, axis);
  const ActivationKind kind = activation_kind(activation);
  const Element element = element_of(x.scalar_type(), "x");
  const Rule which = rule_of(rule);
  if (extent.numel == 0) return {y, mask};
  launch_masked(element, x.const_data_ptr(), y.mutable_data_ptr(), static_cast<uint8_t*>(mask.mutable_data_ptr()),
                extent, source_of(s, z, quant_min, quant_max), kind, which, false, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mask};
}

Tensor masked_backward(const Tensor& grad_output, const Tensor& mask, std::vector<int64_t> stride) {
  const int64_t dims = grad_output.dim(), numel = grad_output.numel();
  CLUSTERQ_CHECK(static_cast<int64_t>(stride.size()) == dims, "stride has ", stride.size(), " numbers, wanted ", dims);
  check_dtype(mask, ScalarType::Byte, "mask");
  check_numel(mask, ceil_div(numel, 8), "mask");
  check_device(mask, grad_output, "mask");
  const Element element = element_of(grad_output.scalar_type(), "grad");
  const Launch launch(grad_output);
  const Tensor out = empty_with_strides(grad_output, stride);
  // Else the walk over memory would leave the tensor.
  CLUSTERQ_CHECK(fills_memory(out), "stride leaves gaps in memory or repeats elements");
  if (numel == 0) return out;
  Tensor grad = grad_output;
  if (!same_strides(grad_output, out)) {
    // Dense, so `empty_like` keeps its strides.
    grad = torch::stable::empty_like(out);
    torch::stable::copy_(grad, grad_output);
  }
  const Tensor bits = packed(mask);
  const int bytes = element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
  launch_masked_backward(bytes, grad.const_data_ptr(), static_cast<const uint8_t*>(bits.const_data_ptr()),
                         out.mutable_data_ptr(), numel, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> finite_range(const Tensor& input, std::optional<int64_t> axis, std::string activation) {
  const Launch launch(input);
  const Tensor x = dense(input);
  const Extent extent = extent_of(x, axis);
  const Element element = element_of(x.scalar_type(), "x");
  const ScalarType dtype = compute_dtype(x.scalar_type());
  const Tensor low = new_channels(x, extent.channels, dtype), high = new_channels(x, extent.channels, dtype);
  if (extent.channels == 0) return {low, high};
  RangeTarget target;
  target.low = low.mutable_data_ptr();
  target.high = high.mutable_data_ptr();
  const Scratch scratch(x, element, extent.channels, launch.stream());
  launch_range(element, x.const_data_ptr(), extent, activation_kind(activation), target, scratch.range,
               launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {low, high};
}

// x, its running range and what the three observing ops make of them.
struct Observed {
  Tensor x, running_min, running_max, low, high, scale, zero_point, y;
  Extent extent;
  Element element;
  ActivationKind activation;
  CodeRange codes;

  Observed(const Tensor& input, const Tensor& running_low, const Tensor& running_high, int64_t quant_min,
           int64_t quant_max, bool symmetric, std::optional<int64_t> axis, const std::string& name)
      : x(dense(input)), running_min(running_low), running_max(running_high) {
    check_parameters(input, input.scalar_type(), running_min, "running_min", running_max, "running_max");
    check_writable(running_min, "running_min");
    check_writable(running_max, "running_max");
    extent = extent_of(x, axis);
    check_numel(running_min, extent.channels, "running_min");
    element = element_of(x.scalar_type(), "x");
    activation = activation_kind(name);
    codes = {quant_min, quant_max, symmetric};
    low = packed(running_min);
    high = packed(running_max);
    scale = torch::stable::new_empty(running_min, running_min.sizes());
    zero_point = torch::stable::new_empty(running_min, running_min.sizes());
    y = torch::stable::empty_like(x);
  }

  bool nothing() const { return extent.channels == 0; }

  RangeTarget target(RangeUse use, double momentum) const {
    return {use,
            codes,
            momentum,
            low.mutable_data_ptr(),
            high.mutable_data_ptr(),
            scale.mutable_data_ptr(),
            zero_point.mutable_data_ptr()};
  }

  // Of the range as it is now.
  GridSource from_range() const {
    GridSource source;
    source.codes = codes;
    source.low = low.const_data_ptr();
    source.high = high.const_data_ptr();
    source.to_scale = scale.mutable_data_ptr();
    source.to_zero_point = zero_point.mutable_data_ptr();
    return source;
  }

  void move(double momentum, cudaStream_t stream) {
    const Scratch scratch(x, element, extent.channels, stream);
    launch_range(element, x.const_data_ptr(), extent, activation, target(RangeUse::kMove, momentum), scratch.range,
                 stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    write_back();
  }

  void write_back() {
    if (!running_min.is_contiguous()) torch::stable::copy_(running_min, low);
    if (!running_max.is_contiguous()) torch::stable::copy_(running_max, high);
  }
};

std::tuple<Tensor, Tensor, Tensor> observe(const Tensor& input, Tensor running_min, Tensor running_max,
                                           int64_t quant_min, int64_t quant_max, double momentum, bool watch,
                                           bool symmetric, std::optional<int64_t> axis, std::string activation) {
  const Launch launch(input);
  Observed o(input, running_min, running_max, quant_min, quant_max, symmetric, axis, activation);
  if (o.nothing()) return {o.y, o.scale, o.zero_point};
  if (watch) {
    o.move(momentum, launch.stream());
    if (o.extent.numel > 0)
      launch_fake_quantize(o.element, o.x.const_data_ptr(), o.y.mutable_data_ptr(), o.extent,
                           source_of(o.scale, o.zero_point, quant_min, quant_max), o.activation, true, launch.stream());
  } else {
    launch_fake_quantize_from_range(o.element, o.x.const_data_ptr(), o.y.mutable_data_ptr(), o.extent, o.from_range(),
                                    o.activation, launch.stream());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {o.y, o.scale, o.zero_point};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> observe_masked(const Tensor& input, Tensor running_min, Tensor running_max,
                                                          int64_t quant_min, int64_t quant_max, double momentum,
                                                          bool watch, bool symmetric, std::optional<int64_t> axis,
                                                          std::string activation, std::string rule) {
  const Launch launch(input);
  const Rule which = rule_of(rule);
  Observed o(input, running_min, running_max, quant_min, quant_max, symmetric, axis, activation);
  const Tensor mask = new_mask(o.x);
  auto* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  if (o.nothing()) return {o.y, o.scale, o.zero_point, mask};
  if (watch) {
    o.move(momentum, launch.stream());
    if (o.extent.numel > 0)
      launch_masked(o.element, o.x.const_data_ptr(), o.y.mutable_data_ptr(), bits, o.extent,
                    source_of(o.scale, o.zero_point, quant_min, quant_max), o.activation, which, true, launch.stream());
  } else {
    launch_masked_from_range(o.element, o.x.const_data_ptr(), o.y.mutable_data_ptr(), bits, o.extent, o.from_range(),
                             o.activation, which, launch.stream());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {o.y, o.scale, o.zero_point, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delayed(const Tensor& input, Tensor running_min, Tensor running_max,
                                                   int64_t quant_min, int64_t quant_max, double momentum,
                                                   bool symmetric, std::optional<int64_t> axis, std::string activation,
                                                   std::string rule) {
  const Launch launch(input);
  const Rule which = rule_of(rule);
  Observed o(input, running_min, running_max, quant_min, quant_max, symmetric, axis, activation);
  const Tensor mask = new_mask(o.x);
  if (o.nothing()) return {o.y, o.scale, o.zero_point, mask};
  const Scratch scratch(o.x, o.element, o.extent.channels, launch.stream());
  launch_delayed(o.element, o.x.const_data_ptr(), o.y.mutable_data_ptr(),
                 static_cast<uint8_t*>(mask.mutable_data_ptr()), o.extent, o.activation, which,
                 o.target(RangeUse::kDelayed, momentum), scratch.range, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  o.write_back();
  return {o.y, o.scale, o.zero_point, mask};
}

}  // namespace

std::vector<std::string> fake_quant_range_ops() {
  return {"fake_quantize_masked",  "fake_quantize_masked_backward", "finite_range",
          "observe_fake_quantize", "observe_fake_quantize_masked",  "delayed_fake_quantize"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("fake_quantize_masked", TORCH_BOX(&clusterq::masked));
  m.impl("fake_quantize_masked_backward", TORCH_BOX(&clusterq::masked_backward));
  m.impl("finite_range", TORCH_BOX(&clusterq::finite_range));
  m.impl("observe_fake_quantize", TORCH_BOX(&clusterq::observe));
  m.impl("observe_fake_quantize_masked", TORCH_BOX(&clusterq::observe_masked));
  m.impl("delayed_fake_quantize", TORCH_BOX(&clusterq::delayed));
}
