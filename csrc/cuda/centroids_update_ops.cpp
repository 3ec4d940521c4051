// Sums by centroid, the gradient of the distances and the moving average of CUDA tensors: checks, outputs, launches.
#include <tuple>

#include "centroids_host.h"

namespace clusterq {
namespace {

// Scratch of the ordered sums, kept alive.
struct Scratch {
  Tensor counts, starts, segments, order, partial;

  void give(SegmentSums& sums, const Tensor& x) {
    const int64_t batch = sums.x.batch, rows = sums.x.rows, clusters = sums.clusters;
    sums.plan = plan_sums(rows, clusters);
    const auto room = [&](Tensor& tensor, int64_t values, ScalarType dtype) {
      tensor = sized(x, {values}, dtype);
      return tensor.mutable_data_ptr();
    };
    sums.counts = static_cast<int32_t*>(room(counts, batch * sums.plan.tiles * clusters, ScalarType::Int));
    torch::stable::zero_(counts);
    sums.starts = static_cast<int32_t*>(room(starts, batch * (clusters + 1), ScalarType::Int));
    sums.segments = static_cast<int32_t*>(room(segments, batch * (clusters + 1), ScalarType::Int));
    sums.order = static_cast<int32_t*>(room(order, batch * rows, ScalarType::Int));
    sums.partial =
        static_cast<double*>(room(partial, batch * sums.plan.segments * (sums.x.dim + 1), ScalarType::Double));
  }
};

Tensor checked_rows(const Tensor& tensor, const RowInput& rows, ScalarType dtype, const char* name) {
  check_dtype(tensor, dtype, name);
  check_sizes(tensor, {rows.source.batch, rows.source.rows}, name);
  check_device(tensor, rows.x, name);
  return packed(tensor);
}

Tensor centroid_sums(const Tensor& x, const Tensor& index, Optional weights, int64_t clusters, bool deterministic) {
  const RowInput rows(x);
  CLUSTERQ_CHECK(clusters >= 0 && clusters < (int64_t(1) << 30), "clusters is ", clusters, ", wanted 0 to 2^30");
  const Tensor labels = checked_rows(index, rows, ScalarType::Long, "index");
  Optional given;
  if (weights) given = checked_rows(*weights, rows, rows.dtype, "weights");
  const int64_t batch = rows.source.batch;
  Tensor result = sized(x, {batch, clusters, rows.source.dim + 1}, ScalarType::Double);
  if (result.numel() == 0) return result;
  const Launch launch(x);
  SegmentSums sums;
  sums.x = rows.source;
  sums.clusters = clusters;
  sums.index = static_cast<const int64_t*>(labels.const_data_ptr());
  sums.weights = given ? given->const_data_ptr() : nullptr;
  sums.result = result.mutable_data_ptr();
  Scratch scratch;
  if (rows.empty() || !deterministic) {
    torch::stable::zero_(result);
    if (!rows.empty()) launch_atomic_sums(sums, launch.stream());
  } else {
    scratch.give(sums, x);
    launch_ordered_sums(sums, launch.stream());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

std::tuple<Tensor, Tensor> nearest_centroid_backward(const Tensor& grad, const Tensor& x, const Tensor& centroids,
                                                     const Tensor& index) {
  const RowInput rows(x);
  const CentroidInput given(centroids, rows);
  const Tensor slope = checked_rows(grad, rows, rows.dtype, "grad");
  const Tensor labels = checked_rows(index, rows, ScalarType::Long, "index");
  const int64_t batch = rows.source.batch, dim = rows.source.dim;
  Tensor grad_x = sized(x, {batch, rows.source.rows, dim}, x.scalar_type());
  Tensor grad_centroids = sized(x, {batch, given.clusters, dim}, centroids.scalar_type());
  if (rows.empty()) {
    if (grad_centroids.numel() > 0) torch::stable::zero_(grad_centroids);
    return {grad_x, grad_centroids};
  }
  const Launch launch(x);
  SegmentSums sums;
  sums.flow = true;
  sums.x = rows.source;
  sums.clusters = given.clusters;
  sums.index = static_cast<const int64_t*>(labels.const_data_ptr());
  sums.weights = slope.const_data_ptr();
  sums.centroid_element = given.element;
  sums.centroids = given.centroids.const_data_ptr();
  sums.result_element = element_of(centroids.scalar_type(), "centroids");
  sums.result = grad_centroids.mutable_data_ptr();
  Scratch scratch;
  scratch.give(sums, x);
  launch_row_gradient(sums, grad_x.mutable_data_ptr(), launch.stream());
  launch_ordered_sums(sums, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_centroids};
}

std::tuple<Tensor, Tensor, Tensor> assign_and_sum(const Tensor& x, const Tensor& centroids, Optional weights,
                                                  std::string precision, bool deterministic) {
  CLUSTERQ_CHECK(centroids.dim() == 3, "centroids has ", centroids.dim(), " dimensions, wanted 3");
  const auto [index, distance] = nearest_centroid(x, centroids, precision);
  return {index, distance, centroid_sums(x, index, weights, centroids.size(1), deterministic)};
}

Strided strided(Tensor& tensor, const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes,
                const char* name) {
  check_dtype(tensor, dtype, name);
  check_sizes(tensor, sizes, name);
  check_device(tensor, like, name);
  check_writable(tensor, name);
  Strided result;
  result.data = tensor.mutable_data_ptr();
  for (int64_t d = 0; d < tensor.dim(); ++d) result.stride[d] = tensor.stride(d);
  return result;
}

void move_centroids_(Tensor centroids, Tensor cluster_size, Optional running_sum, const Tensor& sums, double decay,
                     std::string update_mode, double smoothing) {
  CLUSTERQ_CHECK(centroids.dim() == 3, "centroids has ", centroids.dim(), " dimensions, wanted 3");
  CLUSTERQ_CHECK(update_mode == "mean" || update_mode == "codebook", "update_mode must be mean or codebook");
  const int64_t batch = centroids.size(0), clusters = centroids.size(1), dim = centroids.size(2);
  const ScalarType dtype = centroids.scalar_type();
  MovingAverage move;
  move.batch = batch;
  move.clusters = clusters;
  move.dim = dim;
  move.element = element_of(dtype, "centroids");
  move.centroids = strided(centroids, centroids, dtype, {batch, clusters, dim}, "centroids");
  move.size = strided(cluster_size, centroids, ScalarType::Float, {batch, clusters}, "cluster_size");
  move.mode = update_mode == "mean" ? MoveMode::kMean : MoveMode::kCodebook;
  if (running_sum) {
    move.running = strided(*running_sum, centroids, compute_dtype(dtype), {batch, clusters, dim}, "running_sum");
    move.mode = MoveMode::kRunning;
  }
  check_dtype(sums, ScalarType::Double, "sums");
  check_sizes(sums, {batch, clusters, dim + 1}, "sums");
  check_device(sums, centroids, "sums");
  if (batch * clusters == 0) return;
  const Launch launch(centroids);
  const Tensor totals = packed(sums), whole = sized(centroids, {batch}, ScalarType::Double);
  move.sums = static_cast<const double*>(totals.const_data_ptr());
  move.whole = static_cast<double*>(whole.mutable_data_ptr());
  move.decay = decay;
  move.smoothing = smoothing;
  launch_move(move, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::vector<std::string> centroid_update_ops() {
  return {"nearest_centroid_backward", "centroid_sums", "assign_and_sum", "move_centroids_"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("nearest_centroid_backward", TORCH_BOX(&clusterq::nearest_centroid_backward));
  m.impl("centroid_sums", TORCH_BOX(&clusterq::centroid_sums));
  m.impl("assign_and_sum", TORCH_BOX(&clusterq::assign_and_sum));
  m.impl("move_centroids_", TORCH_BOX(&clusterq::move_centroids_));
}
