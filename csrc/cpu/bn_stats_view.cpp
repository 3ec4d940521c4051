// Arguments of the bn_stats ops: layouts, shapes and dtypes.
#include "cpu/bn_stats.h"
#include "cpu/memory.h"

namespace clusterq::bn_stats {
namespace {

bool is_dense(const Tensor& x, bool channels_innermost) {
  const int64_t dims = x.dim();
  int64_t expected = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int64_t axis = !channels_innermost || i == 0 ? i : i == dims - 1 ? 1 : i + 1;
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

}  // namespace

View view(const Tensor& x) {
  CLUSTERQ_CHECK(x.dim() >= 2, "x must be [N, C, *spatial]");
  int64_t spatial = 1;
  for (int64_t i = 2; i < x.dim(); ++i) spatial *= x.size(i);
  const bool planes = is_dense(x, false), rows = !planes && x.dim() > 2 && is_dense(x, true);
  return View{planes || rows ? x : packed(x), x.size(0), x.size(1), spatial, rows || spatial == 1};
}

Tensor in_order_of(const View& x, const Tensor& tensor, const char* name) {
  CLUSTERQ_CHECK(tensor.scalar_type() == x.tensor.scalar_type(), name, " must have the dtype of x");
  check_same_sizes(tensor, x.tensor, name);
  if (is_dense(tensor, x.rows && x.spatial != 1)) return tensor;
  Tensor out = torch::stable::empty_like(x.tensor);
  torch::stable::copy_(out, tensor);
  return out;
}

Tensor empty_like(const View& x) { return output_like(x.tensor); }

ScalarType statistics_dtype(const View& x) { return compute_dtype(x.tensor.scalar_type()); }

Tensor per_channel(const View& x, const Tensor& tensor, const char* name) {
  check_dtype(tensor, statistics_dtype(x), name);
  check_sizes(tensor, {x.channels}, name);
  return packed(tensor);
}

Rows rows_of(const View& x, const Tensor& tensor, const char* name) {
  check_dtype(tensor, statistics_dtype(x), name);
  const bool shared = has_sizes(tensor, {1, x.channels});
  if (!shared) check_sizes(tensor, {x.images, x.channels}, name);
  if (x.channels == 1 || tensor.stride(1) == 1) return {tensor, shared ? 0 : tensor.stride(0)};
  return {packed(tensor), shared ? 0 : x.channels};
}

Parameters parameters_of(const View& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps) {
  Parameters result{per_channel(x, running_mean, "running_mean"), per_channel(x, running_var, "running_var"),
                    std::nullopt, std::nullopt, eps};
  if (weight.has_value()) result.weight = per_channel(x, *weight, "weight");
  if (bias.has_value()) result.bias = per_channel(x, *bias, "bias");
  return result;
}

}  // namespace clusterq::bn_stats
