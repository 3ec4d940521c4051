// The ops on BatchNorm statistics of CUDA tensors, forward: checks, outputs, launches.
#include <tuple>

#include "bn_stats_host.h"

namespace clusterq {
namespace {

// Moments of every image, or part of one, for a merge.
Merge launch_moments(const Input& input, Samples samples, const Normalization* norm, Tensor& moments,
                     cudaStream_t stream) {
  Merge merge;
  merge.images = input.samples.images;
  merge.channels = input.samples.channels;
  merge.positions = merge.part = input.samples.positions;
  if (input.empty()) return merge;
  const StatisticsPlan plan = plan_statistics(input.bytes(), samples, all_aligned(input, norm), true);
  merge.images = samples.images;
  merge.positions = samples.positions;
  merge.part = plan.part;
  merge.parts = plan.parts;
  moments = new_channels(input.x, 2 * samples.images * plan.parts * samples.channels, ScalarType::Double);
  StatisticsTarget target;
  target.moments = static_cast<Moments*>(moments.mutable_data_ptr());
  launch_statistics(input.element, input.x.const_data_ptr(), samples, plan, norm, target, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  merge.moments = target.moments;
  return merge;
}

std::tuple<Tensor, Tensor> instances(const Input& input, const Normalization* norm, cudaStream_t stream) {
  const Samples& samples = input.samples;
  const Tensor mean = input.pair(samples.images), var = input.pair(samples.images);
  if (input.empty()) {
    fill_nan(mean);
    fill_nan(var);
    return {mean, var};
  }
  const StatisticsPlan plan = plan_statistics(input.bytes(), samples, all_aligned(input, norm), false);
  StatisticsTarget target;
  target.mean = mean.mutable_data_ptr();
  target.var = var.mutable_data_ptr();
  target.stride = samples.channels;
  Tensor moments;
  if (plan.parts > 1) {
    moments = new_channels(input.x, 2 * samples.images * plan.parts * samples.channels, ScalarType::Double);
    target.moments = static_cast<Moments*>(moments.mutable_data_ptr());
  }
  launch_statistics(input.element, input.x.const_data_ptr(), samples, plan, norm, target, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (plan.parts > 1) {
    Merge merge;
    merge.groups = Groups::kImages;
    merge.moments = target.moments;
    merge.images = samples.images;
    merge.channels = samples.channels;
    merge.positions = samples.positions;
    merge.part = plan.part;
    merge.parts = plan.parts;
    merge.mean = target.mean;
    merge.var = target.var;
    launch_merge(input.element, merge, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor> instance_statistics(const Tensor& x) {
  const Launch launch(x);
  return instances(Input(x), nullptr, launch.stream());
}

std::tuple<Tensor, Tensor, Tensor> norm_instances(const Tensor& x, Optional weight, Optional bias,
                                                  const Tensor& running_mean, const Tensor& running_var, double eps) {
  const Launch launch(x);
  const Input input(x);
  Parameters parameters(input, weight, bias, running_mean, running_var, eps);
  const Tensor y = torch::stable::empty_like(input.x);
  parameters.norm.y = y.mutable_data_ptr();
  auto [mean, var] = instances(input, &parameters.norm, launch.stream());
  return {y, mean, var};
}

// Without weights images are not told apart: a segment may hold several, where the layout lets it.
Samples batch_samples(const Samples& samples) {
  if (!samples.rows && samples.positions != 1 && samples.channels != 1) return samples;
  return {1, samples.channels, samples.images * samples.positions, samples.channels > 1};
}

std::tuple<Tensor, Tensor> batch(const Input& input, const Normalization* norm, int64_t correction,
                                 cudaStream_t stream) {
  const Tensor mean = input.row(), var = input.row();
  if (input.samples.channels == 0) return {mean, var};
  Tensor moments;
  Merge merge = launch_moments(input, batch_samples(input.samples), norm, moments, stream);
  merge.correction = correction;
  merge.mean = mean.mutable_data_ptr();
  merge.var = var.mutable_data_ptr();
  launch_merge(input.element, merge, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {mean, var};
}

// Moments that groups of images are made of: x itself where it is one position per image and channel.
Merge image_moments(const Input& input, Tensor& moments, cudaStream_t stream) {
  if (input.samples.positions != 1 || input.empty())
    return launch_moments(input, input.samples, nullptr, moments, stream);
  Merge merge;
  merge.x = input.x.const_data_ptr();
  merge.images = input.samples.images;
  merge.channels = input.samples.channels;
  merge.positions = merge.part = 1;
  return merge;
}

Tensor checked_weights(const Input& input, const Tensor& weights) {
  check_dtype(weights, input.dtype, "weights");
  check_sizes(weights, {input.samples.images}, "weights");
  check_device(weights, input.x, "weights");
  return packed(weights);
}

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x, int64_t correction, Optional weights) {
  const Launch launch(x);
  const Input input(x);
  if (!weights) return batch(input, nullptr, correction, launch.stream());
  const Tensor share = checked_weights(input, *weights);
  const Tensor mean = input.row(), var = input.row();
  if (input.samples.channels == 0) return {mean, var};
  Tensor moments;
  Merge merge = image_moments(input, moments, launch.stream());
  merge.weights = share.const_data_ptr();
  merge.correction = correction;
  merge.mean = mean.mutable_data_ptr();
  merge.var = var.mutable_data_ptr();
  launch_merge(input.element, merge, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> norm_batch(const Tensor& x, Optional weight, Optional bias,
                                              const Tensor& running_mean, const Tensor& running_var, double eps) {
  const Launch launch(x);
  const Input input(x);
  Parameters parameters(input, weight, bias, running_mean, running_var, eps);
  const Tensor y = torch::stable::empty_like(input.x);
  parameters.norm.y = y.mutable_data_ptr();
  auto [mean, var] = batch(input, &parameters.norm, 0, launch.stream());
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> classes(const Tensor& x, const Tensor& labels, int64_t num_classes,
                                                   Optional weights) {
  const Launch launch(x);
  const Input input(x);
  CLUSTERQ_CHECK(num_classes >= 0, "num_classes is ", num_classes, ", wanted 0 or more");
  check_dtype(labels, ScalarType::Long, "labels");
  check_sizes(labels, {input.samples.images}, "labels");
  check_device(labels, x, "labels");
  const Tensor own = packed(labels);
  Optional share;
  if (weights) share = checked_weights(input, *weights);
  const Tensor count = new_channels(x, num_classes, ScalarType::Long);
  const Tensor total = new_channels(x, num_classes, input.dtype);
  const Tensor mean = input.pair(num_classes), var = input.pair(num_classes);
  if (num_classes == 0) return {count, total, mean, var};
  Tensor moments;
  Merge merge = image_moments(input, moments, launch.stream());
  merge.groups = Groups::kClasses;
  merge.labels = static_cast<const int64_t*>(own.const_data_ptr());
  merge.weights = share ? share->const_data_ptr() : nullptr;
  merge.classes = num_classes;
  merge.count = static_cast<int64_t*>(count.mutable_data_ptr());
  merge.total = total.mutable_data_ptr();
  merge.mean = mean.mutable_data_ptr();
  merge.var = var.mutable_data_ptr();
  launch_merge(input.element, merge, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {count, total, mean, var};
}

std::tuple<Tensor, Tensor> listed_statistics(std::vector<Tensor> xs) {
  CLUSTERQ_CHECK(!xs.empty(), "xs is empty");
  const Launch launch(xs[0]);
  const Inputs inputs(xs);
  const std::array<int64_t, 2> sizes{inputs.images, inputs.columns};
  const Tensor mean = torch::stable::new_empty(xs[0], sizes, inputs.each[0].dtype);
  const Tensor var = torch::stable::new_empty(xs[0], sizes, inputs.each[0].dtype);
  std::vector<Listed> entries;
  bool undefined = false;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Input& input = inputs.each[i];
    if (!input.empty()) entries.push_back({input.x.const_data_ptr(), input.samples, inputs.first[i]});
    undefined |= input.empty() && input.samples.channels > 0;
  }
  // Columns of x without positions; those of the others are written next.
  if (undefined) {
    fill_nan(mean);
    fill_nan(var);
  }
  launch_statistics_list(inputs.each[0].element, entries.data(), static_cast<int64_t>(entries.size()),
                         mean.mutable_data_ptr(), var.mutable_data_ptr(), inputs.columns, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {mean, var};
}

}  // namespace

std::vector<std::string> bn_stats_ops() {
  return {"instance_statistics", "instance_statistics_list",       "batch_norm_statistics",
          "class_statistics",    "batch_norm_instance_statistics", "batch_norm_batch_statistics"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("instance_statistics", TORCH_BOX(&clusterq::instance_statistics));
  m.impl("instance_statistics_list", TORCH_BOX(&clusterq::listed_statistics));
  m.impl("batch_norm_statistics", TORCH_BOX(&clusterq::batch_statistics));
  m.impl("class_statistics", TORCH_BOX(&clusterq::classes));
  m.impl("batch_norm_instance_statistics", TORCH_BOX(&clusterq::norm_instances));
  m.impl("batch_norm_batch_statistics", TORCH_BOX(&clusterq::norm_batch));
}
