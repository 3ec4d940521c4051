// The ops of CUDA tensors on weights: quantization with ranges of their own, errors of candidates, packed codes.
#include <tuple>

#include "host.h"

namespace clusterq {
namespace {

// Below this a warp that walks one channel would use a small part of what it reads.
constexpr int64_t kShortRun = 32;

std::tuple<std::vector<Tensor>, Tensor, Tensor> quantize_weights(const std::vector<Tensor>& inputs, int64_t quant_min,
                                                                 int64_t quant_max, int64_t axis, bool symmetric) {
  CLUSTERQ_CHECK(!inputs.empty(), "weights is empty");
  const Tensor& first = inputs[0];
  const Launch launch(first);
  const ScalarType dtype = compute_dtype(first.scalar_type());
  const Element element = element_of(first.scalar_type(), "weights");
  const CodeRange codes{quant_min, quant_max, symmetric};
  std::vector<Tensor> dense_inputs, outputs;
  std::vector<Extent> extents;
  int64_t channels = 0;
  for (const Tensor& input : inputs) {
    check_dtype(input, first.scalar_type(), "weights");
    check_device(input, first, "weights");
    dense_inputs.push_back(dense(input));
    outputs.push_back(torch::stable::empty_like(dense_inputs.back()));
    extents.push_back(extent_of(dense_inputs.back(), axis));
    channels += extents.back().channels;
  }
  CLUSTERQ_CHECK(channels < int64_t(1) << 31, "weights have too many channels");
  const Tensor scale = new_channels(first, channels, dtype), zero_point = new_channels(first, channels, dtype);
  auto* scales = static_cast<char*>(scale.mutable_data_ptr());
  auto* zero_points = static_cast<char*>(zero_point.mutable_data_ptr());
  const int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  std::vector<Weight> table;
  int64_t start = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Extent& extent = extents[i];
    const Tensor &w = dense_inputs[i], &y = outputs[i];
    const int64_t outer = extent.numel == 0 ? 0 : extent.numel / (extent.channels * extent.inner);
    if (outer > 1 && extent.inner < kShortRun) {
      // Channels that lie side by side: in memory order, in two launches.
      RangeTarget target{RangeUse::kParameters, codes};
      target.scale = scales + start * bytes;
      target.zero_point = zero_points + start * bytes;
      RangeScratch scratch;
      Tensor words;
      const int64_t wanted = range_words(element, extent.channels);
      scratch.reserved = reserve_range_words(w.get_device_index(), launch.stream(), wanted);
      if (scratch.reserved < 0) {
        const std::array<int64_t, 1> sizes{wanted};
        words = torch::stable::new_zeros(w, sizes, ScalarType::Int);
        scratch.words = static_cast<uint32_t*>(words.mutable_data_ptr());
      }
      launch_range(element, w.const_data_ptr(), extent, ActivationKind::kNone, target, scratch, launch.stream());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      GridSource source;
      source.codes = codes;
      source.scale = target.scale;
      source.zero_point = target.zero_point;
      launch_fake_quantize(element, w.const_data_ptr(), y.mutable_data_ptr(), extent, source, ActivationKind::kNone,
                           true, launch.stream());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    } else {
      table.push_back({w.const_data_ptr(), y.mutable_data_ptr(), outer, extent.channels, extent.inner, start});
    }
    start += extent.channels;
  }
  launch_weights(element, table.data(), static_cast<int64_t>(table.size()), codes, scales, zero_points,
                 launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {outputs, scale, zero_point};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> weights(std::vector<Tensor> inputs, int64_t quant_min,
                                                        int64_t quant_max, int64_t axis, bool symmetric) {
  return quantize_weights(inputs, quant_min, quant_max, axis, symmetric);
}

std::tuple<Tensor, Tensor, Tensor> weight(const Tensor& input, int64_t quant_min, int64_t quant_max, int64_t axis,
                                          bool symmetric) {
  auto [outputs, scale, zero_point] = quantize_weights({input}, quant_min, quant_max, axis, symmetric);
  return {outputs[0], scale, zero_point};
}

Tensor error(const Tensor& input, const Tensor& scales, const Tensor& zero_points, int64_t quant_min, int64_t quant_max,
             std::optional<int64_t> axis) {
  check_parameters(input, input.scalar_type(), scales, "scales", zero_points, "zero_points");
  CLUSTERQ_CHECK(scales.dim() == 2 && zero_points.dim() == 2, "scales and zero_points must be [candidates, channels]");
  const Launch launch(input);
  const Tensor x = dense(input), s = packed(scales), z = packed(zero_points);
  const Extent extent = extent_of(x, axis);
  const Element element = element_of(x.scalar_type(), "x");
  const int64_t candidates = scales.size(0);
  check_numel(scales, candidates * extent.channels, "scales");
  if (extent.numel == 0 || candidates == 0) return torch::stable::new_zeros(scales, scales.sizes(), ScalarType::Double);
  const Tensor result = torch::stable::new_empty(scales, scales.sizes(), ScalarType::Double);
  const Tensor partial = new_channels(x, error_splits(extent, candidates) * scales.numel(), ScalarType::Double);
  launch_error(element, x.const_data_ptr(), extent, s.const_data_ptr(), z.const_data_ptr(), candidates,
               {quant_min, quant_max, false}, static_cast<double*>(partial.mutable_data_ptr()),
               static_cast<double*>(result.mutable_data_ptr()), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// x with another size of the last dimension, uninitialised.
Tensor new_rows(const Tensor& x, int64_t last, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return torch::stable::new_empty(x, sizes, dtype);
}

void check_packing(const Tensor& x, int64_t bits, const char* name) {
  CLUSTERQ_CHECK(bits == 2 || bits == 4, "bits is ", bits, "; wanted 2 or 4");
  CLUSTERQ_CHECK(x.dim() > 0, name, " has no dimensions");
  CLUSTERQ_CHECK(x.scalar_type() == ScalarType::Byte || x.scalar_type() == ScalarType::Char, name,
                 " must be uint8 or int8");
}

Tensor pack(const Tensor& input, int64_t bits) {
  check_packing(input, bits, "codes");
  const Launch launch(input);
  const Tensor codes = packed(input);
  const int64_t length = codes.size(codes.dim() - 1);
  const Tensor bytes = new_rows(codes, ceil_div(length, 8 / bits), ScalarType::Byte);
  if (codes.numel() == 0) return bytes;
  launch_pack(static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<uint8_t*>(bytes.mutable_data_ptr()),
              codes.numel() / length, length, static_cast<int>(bits), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return bytes;
}

Tensor unpack(const Tensor& input, int64_t bits, int64_t length, bool is_signed) {
  check_packing(input, bits, "packed");
  const Launch launch(input);
  const Tensor bytes = packed(input);
  CLUSTERQ_CHECK(length >= 0 && bytes.size(bytes.dim() - 1) == ceil_div(length, 8 / bits), "packed has ",
                 bytes.size(bytes.dim() - 1), " bytes to the row, wanted ", ceil_div(length, 8 / bits));
  const Tensor codes = new_rows(bytes, length, is_signed ? ScalarType::Char : ScalarType::Byte);
  if (codes.numel() == 0) return codes;
  launch_unpack(static_cast<const uint8_t*>(bytes.const_data_ptr()), static_cast<uint8_t*>(codes.mutable_data_ptr()),
                codes.numel() / length, length, static_cast<int>(bits), is_signed, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return codes;
}

}  // namespace

std::vector<std::string> fake_quant_weight_ops() {
  return {"fake_quantize_weight", "fake_quantize_weights", "quantization_error", "pack_codes", "unpack_codes"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("fake_quantize_weight", TORCH_BOX(&clusterq::weight));
  m.impl("fake_quantize_weights", TORCH_BOX(&clusterq::weights));
  m.impl("quantization_error", TORCH_BOX(&clusterq::error));
  m.impl("pack_codes", TORCH_BOX(&clusterq::pack));
  m.impl("unpack_codes", TORCH_BOX(&clusterq::unpack));
}
