// The ops on BatchNorm statistics of CUDA tensors, backward: checks, outputs, launches.
#include <tuple>

#include "bn_stats_host.h"

namespace clusterq {
namespace {

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
  const bool is_aligned =
      all_aligned(input, nullptr) && reinterpret_cast<uintptr_t>(incoming.const_data_ptr()) % 16 == 0;
  const ParameterPlan plan = plan_parameters(input.bytes(), input.samples, is_aligned);
  const Tensor partial = new_channels(x, 2 * plan.splits * plan.columns, ScalarType::Double);
  launch_parameter_backward(input.element, incoming.const_data_ptr(), input.x.const_data_ptr(), plan, parameters.norm,
                            static_cast<double*>(partial.mutable_data_ptr()), dweight.mutable_data_ptr(),
                            dbias.mutable_data_ptr(), launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dweight, dbias};
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

std::vector<std::string> bn_stats_backward_ops() {
  return {"statistics_backward", "statistics_backward_list", "batch_norm_statistics_backward",
          "batch_norm_parameter_backward"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("statistics_backward", TORCH_BOX(&clusterq::backward));
  m.impl("statistics_backward_list", TORCH_BOX(&clusterq::listed_backward));
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&clusterq::norm_backward));
  m.impl("batch_norm_parameter_backward", TORCH_BOX(&clusterq::parameter_backward));
}
