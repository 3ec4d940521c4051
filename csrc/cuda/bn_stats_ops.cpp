// The ops on BatchNorm statistics of CUDA tensors: checks, outputs, launches.
#include <tuple>

#include "bn_stats.h"
#include "host.h"

namespace clusterq {
namespace {

using Optional = std::optional<Tensor>;

int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  return positions;
}

// Whether the memory of x is [N, spatial, C], contiguous.
bool channels_innermost(const Tensor& x) {
  if (x.dim() < 3) return false;
  int64_t reach = 1;
  const auto next = [&](int64_t d) {
    const bool fits = x.size(d) == 1 || x.stride(d) == reach;
    reach *= x.size(d);
    return fits;
  };
  bool fits = next(1);
  for (int64_t d = x.dim() - 1; d > 1; --d) fits &= next(d);
  return next(0) && fits;
}

// x without gaps, channels innermost where they already are, and its sizes in memory order.
struct Input {
  Tensor x;
  Samples samples;
  Element element;
  ScalarType dtype;

  Input(const Tensor& input, const char* name = "x") : x(input), element(element_of(input.scalar_type(), name)) {
    CLUSTERQ_CHECK(x.dim() >= 2, name, " has ", x.dim(), " dimensions, wanted 2 or more");
    dtype = compute_dtype(x.scalar_type());
    samples = {x.size(0), x.size(1), positions_of(x), false};
    if (x.is_contiguous()) return;
    if (channels_innermost(x)) {
      samples.rows = samples.channels > 1;
    } else {
      x = torch::stable::contiguous(x);
    }
  }

  int bytes() const { return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2; }
  bool empty() const { return samples.numel() == 0; }
  Tensor pair(int64_t rows) const {
    const std::array<int64_t, 2> sizes{rows, samples.channels};
    return torch::stable::new_empty(x, sizes, dtype);
  }
  Tensor row() const { return new_channels(x, samples.channels, dtype); }
};

void fill_nan(const Tensor& tensor) {
  Tensor written = tensor;
  if (tensor.numel() > 0) torch::stable::fill_(written, std::numeric_limits<double>::quiet_NaN());
}

// BatchNorm parameters, contiguous, kept alive for the launch.
struct Parameters {
  Optional weight, bias;
  Tensor mean, var;
  Normalization norm;

  Parameters(const Input& input, const Optional& given_weight, const Optional& given_bias, const Tensor& running_mean,
             const Tensor& running_var, double eps)
      : mean(checked(input, running_mean, "running_mean")), var(checked(input, running_var, "running_var")) {
    if (given_weight) weight = checked(input, *given_weight, "weight");
    if (given_bias) bias = checked(input, *given_bias, "bias");
    norm.weight = weight ? weight->const_data_ptr() : nullptr;
    norm.bias = bias ? bias->const_data_ptr() : nullptr;
    norm.mean = mean.const_data_ptr();
    norm.var = var.const_data_ptr();
    norm.eps = eps;
  }

  static Tensor checked(const Input& input, const Tensor& vector, const char* name) {
    check_dtype(vector, input.dtype, name);
    check_sizes(vector, {input.samples.channels}, name);
    check_device(vector, input.x, name);
    return packed(vector);
  }
};

bool all_aligned(const Input& input, const Normalization* norm) {
  const auto place = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16; };
  return place(input.x.const_data_ptr()) == 0 && (norm == nullptr || place(norm->y) == 0);
}

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

// Rows of coefficients of x: one per image or one for all, wherever its rows begin.
struct Coefficients {
  Tensor rows;
  Rows found;

  Coefficients(const Tensor& x, ScalarType dtype, const Tensor& given, int64_t images, int64_t columns,
               const char* name)
      : rows(given) {
    check_dtype(rows, dtype, name);
    check_device(rows, x, name);
    if (!has_sizes(rows, {1, columns})) check_sizes(rows, {images, columns}, name);
    if (columns > 1 && rows.stride(1) != 1) rows = torch::stable::contiguous(rows);
    found = {rows.const_data_ptr(), rows.size(0) == 1 ? 0 : rows.stride(0)};
  }
};

// center, grad_mean and grad_var, kept alive for the launch.
struct Gradients {
  Coefficients center;
  std::optional<Coefficients> mean, var;

  Gradients(const Tensor& x, ScalarType dtype, int64_t images, int64_t columns, const Tensor& given,
            const Optional& grad_mean, const Optional& grad_var)
      : center(x, dtype, given, images, columns, "center") {
    if (grad_mean) mean.emplace(x, dtype, *grad_mean, images, columns, "grad_mean");
    if (grad_var) var.emplace(x, dtype, *grad_var, images, columns, "grad_var");
  }

  BackwardTask task(const Input& input, const Tensor& dx) const {
    BackwardTask task;
    task.x = input.x.const_data_ptr();
    task.dx = dx.mutable_data_ptr();
    task.center = center.found;
    if (mean) task.grad_mean = mean->found;
    if (var) task.grad_var = var->found;
    task.samples = input.samples;
    return task;
  }
};

Tensor backward(const Tensor& x, const Tensor& center, Optional grad_mean, Optional grad_var, double mean_factor,
                double var_factor) {
  const Launch launch(x);
  const Input input(x);
  const Gradients gradients(x, input.dtype, input.samples.images, input.samples.channels, center, grad_mean, grad_var);
  const Tensor dx = torch::stable::empty_like(input.x);
  if (input.empty()) return dx;
  BackwardTask task = gradients.task(input, dx);
  task.mean_factor = mean_factor;
  task.var_factor = var_factor;
  launch_statistics_backward(input.element, task, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

Tensor norm_backward(const Tensor& grad, const Tensor& x, Optional weight, const Tensor& running_var, double eps,
                     const Tensor& center, Optional grad_mean, Optional grad_var, double mean_factor,
                     double var_factor) {
  const Launch launch(x);
  const Input input(x);
  check_device(grad, x, "grad");
  const Tensor incoming = with_strides_of(grad, input.x);
  const Parameters parameters(input, weight, std::nullopt, running_var, running_var, eps);
  const Gradients gradients(x, input.dtype, input.samples.images, input.samples.channels, center, grad_mean, grad_var);
  const Tensor dx = torch::stable::empty_like(input.x);
  if (input.empty()) return dx;
  BackwardTask task = gradients.task(input, dx);
  task.grad = incoming.const_data_ptr();
  task.weight = parameters.norm.weight;
  task.running_var = parameters.norm.var;
  task.eps = eps;
  task.mean_factor = mean_factor;
  task.var_factor = var_factor;
  launch_statistics_backward(input.element, task, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

std::tuple<Tensor, Tensor> parameter_backward(const Tensor& grad, const Tensor& x, const Tensor& running_mean,
                                              const Tensor& running_var, double eps) {
  const Launch launch(x);
  const Input input(x);
  check_device(grad, x, "grad");
  const Tensor incoming = with_strides_of(grad, input.x);
  const Parameters parameters(input, std::nullopt, std::nullopt, running_mean, running_var, eps);
  Tensor dweight = input.row(), dbias = input.row();
  if (input.empty()) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dweight, dbias};
  }
  const bool is_aligned = all_aligned(input, nullptr) &&
                          reinterpret_cast<uintptr_t>(incoming.const_data_ptr()) % 16 == 0;
  const ParameterPlan plan = plan_parameters(input.bytes(), input.samples, is_aligned);
  const Tensor partial = new_channels(x, 2 * plan.splits * plan.columns, ScalarType::Double);
  launch_parameter_backward(input.element, incoming.const_data_ptr(), input.x.const_data_ptr(), plan, parameters.norm,
                            static_cast<double*>(partial.mutable_data_ptr()), dweight.mutable_data_ptr(),
                            dbias.mutable_data_ptr(), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dweight, dbias};
}

// Several x of the same images, dtype and device; `first`: where each begins among the columns of all.
struct Inputs {
  std::vector<Input> each;
  std::vector<int64_t> first;
  int64_t images = 0, columns = 0;

  explicit Inputs(const std::vector<Tensor>& xs) {
    CLUSTERQ_CHECK(!xs.empty(), "xs is empty");
    for (const Tensor& x : xs) {
      check_dtype(x, xs[0].scalar_type(), "xs");
      check_device(x, xs[0], "xs");
      each.emplace_back(x, "xs");
      images = each[0].samples.images;
      CLUSTERQ_CHECK(each.back().samples.images == images, "xs have ", images, " and ", each.back().samples.images,
                     " images, wanted one number");
      first.push_back(columns);
      columns += each.back().samples.channels;
    }
  }
};

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

std::vector<Tensor> listed_backward(std::vector<Tensor> xs, const Tensor& center, Optional grad_mean,
                                    Optional grad_var) {
  CLUSTERQ_CHECK(!xs.empty(), "xs is empty");
  const Launch launch(xs[0]);
  const Inputs inputs(xs);
  const Gradients gradients(xs[0], inputs.each[0].dtype, inputs.images, inputs.columns, center, grad_mean, grad_var);
  std::vector<Tensor> results;
  std::vector<BackwardTask> tasks;
  for (const Input& input : inputs.each) {
    results.push_back(torch::stable::empty_like(input.x));
    tasks.push_back(gradients.task(input, results.back()));
  }
  launch_statistics_backward_list(inputs.each[0].element, tasks.data(), static_cast<int64_t>(tasks.size()),
                                  launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

}  // namespace

std::vector<std::string> bn_stats_ops() {
  return {"instance_statistics", "batch_norm_statistics", "class_statistics", "batch_norm_instance_statistics",
          "batch_norm_batch_statistics", "statistics_backward", "batch_norm_statistics_backward",
          "batch_norm_parameter_backward", "instance_statistics_list", "statistics_backward_list"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("instance_statistics", TORCH_BOX(&clusterq::instance_statistics));
  m.impl("batch_norm_statistics", TORCH_BOX(&clusterq::batch_statistics));
  m.impl("class_statistics", TORCH_BOX(&clusterq::classes));
  m.impl("batch_norm_instance_statistics", TORCH_BOX(&clusterq::norm_instances));
  m.impl("batch_norm_batch_statistics", TORCH_BOX(&clusterq::norm_batch));
  m.impl("statistics_backward", TORCH_BOX(&clusterq::backward));
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&clusterq::norm_backward));
  m.impl("batch_norm_parameter_backward", TORCH_BOX(&clusterq::parameter_backward));
  m.impl("instance_statistics_list", TORCH_BOX(&clusterq::listed_statistics));
  m.impl("statistics_backward_list", TORCH_BOX(&clusterq::listed_backward));
}
