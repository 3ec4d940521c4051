// The range of a tensor, and the running range of an observer with the fake-quantization that follows it.
#include "fake_quant_ranges.h"

namespace clusterq {
namespace {

std::tuple<Tensor, Tensor> finite_range(const Tensor& input, std::optional<int64_t> axis, std::string activation) {
  const Tensor x = dense(input);
  const Walk walk(x, axis);
  const std::array<int64_t, 1> shape{walk.channels};
  Tensor low = torch::stable::new_empty(x, shape, compute_dtype(x.scalar_type()));
  Tensor high = torch::stable::new_empty(x, shape, compute_dtype(x.scalar_type()));
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto ranges =
        channel_ranges<T, A>(walk, activation_of<A>(activation), static_cast<const T*>(x.const_data_ptr()));
    auto* to_low = static_cast<A*>(low.mutable_data_ptr());
    auto* to_high = static_cast<A*>(high.mutable_data_ptr());
    for (int64_t c = 0; c < walk.channels; ++c) {
      to_low[c] = ranges[c].low;
      to_high[c] = ranges[c].high;
    }
  });
  return {low, high};
}

RunningRange observed(const Tensor& x, const Tensor& running_min, const Tensor& running_max, int64_t quant_min,
                      int64_t quant_max, double momentum, bool watch, bool symmetric, std::optional<int64_t> axis,
                      const std::string& activation) {
  const Walk walk(x, axis);
  RunningRange range(running_min, running_max, walk, compute_dtype(x.scalar_type()));
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    if (watch)
      range.move<A>(channel_ranges<T, A>(walk, activation_of<A>(activation), static_cast<const T*>(x.const_data_ptr())),
                    momentum);
    range.make_grids<A>(walk.channels, quant_min, quant_max, symmetric);
  });
  return range;
}

std::tuple<Tensor, Tensor, Tensor> observe(const Tensor& input, Tensor running_min, Tensor running_max,
                                           int64_t quant_min, int64_t quant_max, double momentum, bool watch,
                                           bool symmetric, std::optional<int64_t> axis, std::string activation) {
  const Tensor x = dense(input);
  const RunningRange range =
      observed(x, running_min, running_max, quant_min, quant_max, momentum, watch, symmetric, axis, activation);
  return {forward(x, range.scale, range.zero_point, quant_min, quant_max, axis, activation, watch), range.scale,
          range.zero_point};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> observe_masked(const Tensor& input, Tensor running_min, Tensor running_max,
                                                          int64_t quant_min, int64_t quant_max, double momentum,
                                                          bool watch, bool symmetric, std::optional<int64_t> axis,
                                                          std::string activation, std::string rule) {
  const Tensor x = dense(input);
  const RunningRange range =
      observed(x, running_min, running_max, quant_min, quant_max, momentum, watch, symmetric, axis, activation);
  const auto [y, mask] =
      masked_forward(x, range.scale, range.zero_point, quant_min, quant_max, axis, activation, rule, watch);
  return {y, range.scale, range.zero_point, mask};
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("finite_range", TORCH_BOX(&clusterq::finite_range));
  m.impl("observe_fake_quantize", TORCH_BOX(&clusterq::observe));
  m.impl("observe_fake_quantize_masked", TORCH_BOX(&clusterq::observe_masked));
}
