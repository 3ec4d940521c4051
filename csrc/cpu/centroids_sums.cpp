// Sums of rows by centroid, the moving average over them, and the gradient of the distance on the CPU.
//
// Rows are ordered by centroid with a stable counting sort and cut into segments of at most kSegment rows of one
// centroid. Segments are summed in parallel, in float64 and in row order, then merged in order: the result depends
// neither on the number of threads nor on their timing.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "centroids_common.h"

namespace clusterq {
namespace centroids {
namespace {

constexpr int64_t kSegment = 2048;

struct Segment {
  int64_t slot, begin, end;
};

// Rows of a batch by slot = batch entry * K + centroid.
struct Grouping {
  // row numbers, batch entry * N + n
  std::vector<int64_t> order;
  std::vector<Segment> segments;
  // segments of slot s: first[s] up to first[s + 1]
  std::vector<int64_t> first;
};

// Rows with index -1 or weight 0 belong to no group. Raises before anything is written when an index is out of range.
Grouping group(const int64_t* index, const double* weights, int64_t batch, int64_t rows, int64_t clusters) {
  Grouping result;
  const int64_t slots = batch * clusters;
  std::vector<int64_t> position(slots + 1, 0);
  const auto used = [&](int64_t row) { return index[row] >= 0 && (weights == nullptr || weights[row] != 0); };
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t row = b * rows; row < (b + 1) * rows; row++) {
      CLUSTERQ_CHECK(index[row] >= -1 && index[row] < clusters, "index has the value ", index[row], "; wanted -1 to ",
                     clusters - 1);
      if (used(row)) position[b * clusters + index[row] + 1]++;
    }
  }
  result.first.assign(slots + 1, 0);
  for (int64_t s = 0; s < slots; s++) {
    const int64_t count = position[s + 1];
    position[s + 1] += position[s];
    for (int64_t begin = 0; begin < count; begin += kSegment) {
      result.segments.push_back({s, position[s] + begin, position[s] + std::min(begin + kSegment, count)});
    }
    result.first[s + 1] = static_cast<int64_t>(result.segments.size());
  }
  result.order.resize(position[slots]);
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t row = b * rows; row < (b + 1) * rows; row++) {
      if (used(row)) result.order[position[b * clusters + index[row]]++] = row;
    }
  }
  return result;
}

// sum[d] += weight * x[row][d] over the listed rows; weights may be null.
template <class T>
CLUSTERQ_INLINE void add_rows(const T* x, const int64_t* order, int64_t count, const double* weights, int64_t dim,
                              double* sum) {
  for (int64_t i = 0; i < count; i++) {
    const T* row = x + order[i] * dim;
    if (i + 4 < count) __builtin_prefetch(x + order[i + 4] * dim);
    if (weights == nullptr) {
      for (int64_t d = 0; d < dim; d++) sum[d] += load<double>(row[d]);
    } else {
      const double weight = weights[order[i]];
      for (int64_t d = 0; d < dim; d++) sum[d] += weight * load<double>(row[d]);
    }
  }
}

// Work items per thread below which starting a thread does not pay.
int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_item));
}

// partial [segments, dim] = sums over the segments' rows, by `sum_rows(segment, target)`.
template <class F>
double* sum_segments(const Grouping& groups, int64_t dim, Scratch<double>& memory, const F& sum_rows) {
  const int64_t count = static_cast<int64_t>(groups.segments.size());
  double* partial = memory.reserve(std::max<int64_t>(1, count * dim));
  // Before the threads that use it start.
  cpu_level();
  const int64_t rows = static_cast<int64_t>(groups.order.size());
  torch::stable::parallel_for(0, count, grain(dim * (rows / std::max<int64_t>(1, count) + 1)),
                              [&](int64_t b, int64_t e) {
                                std::fill(partial + b * dim, partial + e * dim, 0.0);
                                for (int64_t s = b; s < e; s++) sum_rows(groups.segments[s], partial + s * dim);
                              });
  return partial;
}

// Adds the later segments of a slot to its first one and returns that; null for a slot without rows.
double* merge(const Grouping& groups, int64_t slot, int64_t dim, double* partial) {
  const int64_t first = groups.first[slot], last = groups.first[slot + 1];
  if (first == last) return nullptr;
  double* total = partial + first * dim;
  for (int64_t s = first + 1; s < last; s++) {
    for (int64_t d = 0; d < dim; d++) total[d] += partial[s * dim + d];
  }
  return total;
}

// Values of a contiguous tensor of any floating dtype.
std::vector<double> doubles_of(const Tensor& tensor, const char* name) {
  std::vector<double> values(tensor.numel());
  for_floating(tensor.scalar_type(), name, [&](auto tag, auto) {
    const auto* source = static_cast<const decltype(tag)*>(tensor.const_data_ptr());
    for (size_t n = 0; n < values.size(); n++) values[n] = load<double>(source[n]);
  });
  return values;
}

Tensor sums(const Tensor& x_any, const Tensor& index_any, const std::optional<Tensor>& weights_any, int64_t clusters) {
  CLUSTERQ_CHECK(x_any.dim() == 3, "x must be [B, N, D]");
  CLUSTERQ_CHECK(clusters >= 1 && clusters < (int64_t{1} << 30), "clusters is ", clusters, "; wanted 1 to 2^30 - 1");
  const int64_t batch = x_any.size(0), rows = x_any.size(1), dim = x_any.size(2);
  check_dtype(index_any, ScalarType::Long, "index");
  check_sizes(index_any, {batch, rows}, "index");
  const Tensor x = packed(x_any), index = packed(index_any);
  std::vector<double> weights;
  if (weights_any.has_value()) {
    check_sizes(*weights_any, {batch, rows}, "weights");
    weights = doubles_of(packed(*weights_any), "weights");
  }
  const double* weight = weights.empty() ? nullptr : weights.data();
  const Grouping groups = group(static_cast<const int64_t*>(index.const_data_ptr()), weight, batch, rows, clusters);
  Tensor result = torch::stable::new_empty(x, {batch, clusters, dim + 1}, ScalarType::Double);
  double* target = static_cast<double*>(result.mutable_data_ptr());
  Scratch<double> memory;
  for_floating(x.scalar_type(), "x", [&](auto tag, auto) {
    using T = decltype(tag);
    const T* values = static_cast<const T*>(x.const_data_ptr());
    double* partial = sum_segments(groups, dim, memory, [&](const Segment& segment, double* sum) {
      at_level<add_rows<T>>(values, groups.order.data() + segment.begin, segment.end - segment.begin, weight, dim, sum);
    });
    torch::stable::parallel_for(0, batch * clusters, grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; slot++) {
        double* row = target + slot * (dim + 1);
        const double* total = merge(groups, slot, dim, partial);
        for (int64_t d = 0; d < dim; d++) row[d] = total == nullptr ? 0.0 : total[d];
        row[dim] = 0;
        for (int64_t s = groups.first[slot]; s < groups.first[slot + 1]; s++) {
          const Segment& segment = groups.segments[s];
          if (weight == nullptr) {
            row[dim] += static_cast<double>(segment.end - segment.begin);
          } else {
            for (int64_t i = segment.begin; i < segment.end; i++) row[dim] += weight[groups.order[i]];
          }
        }
      }
    });
  });
  return result;
}

// The formulas of clusterq/ops/centroids.py for one set of centroids.
struct Average {
  double decay, smoothing;
  bool codebook;

  template <class T, class S>
  void move(T* centroids, float* sizes, S* running, const double* sums, int64_t clusters, int64_t dim) const {
    double whole = 0;
    if (smoothing > 0) {
      for (int64_t k = 0; k < clusters; k++) whole += size(sizes, sums, k, dim);
    }
    torch::stable::parallel_for(0, clusters, grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        const double* total = sums + k * (dim + 1);
        const double count = total[dim], old_size = sizes[k], new_size = size(sizes, sums, k, dim);
        T* target = centroids + k * dim;
        if (running != nullptr) {
          double divisor = new_size;
          if (smoothing > 0) divisor = (new_size + smoothing) / (whole + clusters * smoothing) * whole;
          S* sum = running + k * dim;
          for (int64_t d = 0; d < dim; d++) {
            const double moved = decay * load<double>(sum[d]) + (1 - decay) * total[d];
            sum[d] = store<S>(moved);
            if (divisor != 0) target[d] = store<T>(moved / divisor);
          }
        } else if (count != 0 && (!codebook || new_size != 0)) {
          for (int64_t d = 0; d < dim; d++) {
            const double old = load<double>(target[d]);
            target[d] = store<T>(codebook ? (decay * old_size * old + (1 - decay) * total[d]) / new_size
                                          : decay * old + (1 - decay) * (total[d] / count));
          }
        }
      }
    });
    for (int64_t k = 0; k < clusters; k++) sizes[k] = static_cast<float>(size(sizes, sums, k, dim));
  }

  double size(const float* sizes, const double* sums, int64_t k, int64_t dim) const {
    return decay * static_cast<double>(sizes[k]) + (1 - decay) * sums[k * (dim + 1) + dim];
  }
};

void move(Tensor& centroids_any, Tensor& size_any, std::optional<Tensor>& running_any, const Tensor& sums_any,
          double decay, const std::string& mode, double smoothing) {
  CLUSTERQ_CHECK(mode == "mean" || mode == "codebook", "mode is ", mode, "; wanted mean or codebook");
  CLUSTERQ_CHECK(centroids_any.dim() == 3, "centroids must be [B, K, D]");
  const int64_t batch = centroids_any.size(0), clusters = centroids_any.size(1), dim = centroids_any.size(2);
  check_dtype(size_any, ScalarType::Float, "cluster_size");
  check_sizes(size_any, {batch, clusters}, "cluster_size");
  check_dtype(sums_any, ScalarType::Double, "sums");
  check_sizes(sums_any, {batch, clusters, dim + 1}, "sums");
  check_writable(centroids_any, "centroids");
  check_writable(size_any, "cluster_size");
  const ScalarType statistics = compute_dtype(centroids_any.scalar_type());
  if (running_any.has_value()) {
    check_dtype(*running_any, statistics, "running_sum");
    check_sizes(*running_any, {batch, clusters, dim}, "running_sum");
    check_writable(*running_any, "running_sum");
  }
  const Tensor sums = packed(sums_any);
  Tensor centroids = packed(centroids_any), size = packed(size_any);
  Tensor running = running_any.has_value() ? packed(*running_any) : size;
  const Average average = {decay, smoothing, mode == "codebook"};
  for_floating(centroids.scalar_type(), "centroids", [&](auto tag, auto) {
    using T = decltype(tag);
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t b = 0; b < batch; b++) {
      average.move(static_cast<T*>(centroids.mutable_data_ptr()) + b * clusters * dim,
                   static_cast<float*>(size.mutable_data_ptr()) + b * clusters,
                   running_any.has_value() ? static_cast<S*>(running.mutable_data_ptr()) + b * clusters * dim : nullptr,
                   static_cast<const double*>(sums.const_data_ptr()) + b * clusters * (dim + 1), clusters, dim);
    }
  });
  if (!centroids_any.is_contiguous()) torch::stable::copy_(centroids_any, centroids);
  if (!size_any.is_contiguous()) torch::stable::copy_(size_any, size);
  if (running_any.has_value() && !running_any->is_contiguous()) torch::stable::copy_(*running_any, running);
}

// flow = 2 g (x - c): the gradient of the row, and minus its share of the centroid's.
template <class T>
CLUSTERQ_INLINE void flow_rows(const T* x, const double* centroid, const double* grad, const int64_t* order,
                               int64_t count, int64_t dim, T* grad_x, double* sum) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = order[i];
    const double slope = 2 * grad[row];
    if (i + 4 < count) __builtin_prefetch(x + order[i + 4] * dim);
    for (int64_t d = 0; d < dim; d++) {
      const double flow = slope * (load<double>(x[row * dim + d]) - centroid[d]);
      grad_x[row * dim + d] = store<T>(flow);
      sum[d] += flow;
    }
  }
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& centroids_any,
                                    const Tensor& index_any) {
  const Tensor grad = packed(grad_any), x = packed(x_any), centroids = packed(centroids_any), index = packed(index_any);
  CLUSTERQ_CHECK(x.dim() == 3 && centroids.dim() == 3, "x and centroids must be [B, N, D] and [B, K, D]");
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2), clusters = centroids.size(1);
  CLUSTERQ_CHECK(centroids.size(0) == batch && centroids.size(2) == dim, "x and centroids differ in B or D");
  CLUSTERQ_CHECK((x.scalar_type() == ScalarType::Double) == (centroids.scalar_type() == ScalarType::Double),
                 "float64 goes with float64 only");
  check_dtype(index, ScalarType::Long, "index");
  check_sizes(index, {batch, rows}, "index");
  check_dtype(grad, compute_dtype(x.scalar_type()), "grad");
  check_sizes(grad, {batch, rows}, "grad");
  const int64_t* labels = static_cast<const int64_t*>(index.const_data_ptr());
  const Grouping groups = group(labels, nullptr, batch, rows, clusters);
  Tensor grad_x = torch::stable::new_empty(x, {batch, rows, dim});
  Tensor grad_centroids = torch::stable::new_empty(centroids, {batch, clusters, dim});
  const std::vector<double> slopes = doubles_of(grad, "grad");
  const std::vector<double> means = doubles_of(centroids, "centroids");
  Scratch<double> memory;
  double* partial = nullptr;
  for_floating(x.scalar_type(), "x", [&](auto tag, auto) {
    using T = decltype(tag);
    const T* points = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(grad_x.mutable_data_ptr());
    for (int64_t row = 0; row < batch * rows; row++) {
      if (labels[row] < 0) std::memset(static_cast<void*>(out + row * dim), 0, sizeof(T) * dim);
    }
    partial = sum_segments(groups, dim, memory, [&](const Segment& segment, double* sum) {
      at_level<flow_rows<T>>(points, means.data() + segment.slot * dim, slopes.data(),
                             groups.order.data() + segment.begin, segment.end - segment.begin, dim, out, sum);
    });
  });
  for_floating(centroids.scalar_type(), "centroids", [&](auto tag, auto) {
    using T = decltype(tag);
    T* out = static_cast<T*>(grad_centroids.mutable_data_ptr());
    torch::stable::parallel_for(0, batch * clusters, grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; slot++) {
        const double* total = merge(groups, slot, dim, partial);
        for (int64_t d = 0; d < dim; d++) out[slot * dim + d] = store<T>(total == nullptr ? 0.0 : -total[d]);
      }
    });
  });
  return {grad_x, grad_centroids};
}

std::tuple<Tensor, Tensor> nearest_centroid_backward(Tensor grad, Tensor x, Tensor centroids, Tensor index) {
  return backward(grad, x, centroids, index);
}

Tensor centroid_sums(Tensor x, Tensor index, std::optional<Tensor> weights, int64_t clusters, bool) {
  return sums(x, index, weights, clusters);
}

std::tuple<Tensor, Tensor, Tensor> assign_and_sum(Tensor x, Tensor centroids, std::optional<Tensor> weights,
                                                  std::string precision, bool) {
  auto [index, distance] = nearest_centroid(x, centroids, std::move(precision));
  return {index, distance, sums(x, index, weights, centroids.size(1))};
}

void move_centroids_(Tensor centroids, Tensor cluster_size, std::optional<Tensor> running_sum, Tensor sums,
                     double decay, std::string mode, double smoothing) {
  move(centroids, cluster_size, running_sum, sums, decay, mode, smoothing);
}

}  // namespace
}  // namespace centroids
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("nearest_centroid_backward", TORCH_BOX(&clusterq::centroids::nearest_centroid_backward));
  m.impl("centroid_sums", TORCH_BOX(&clusterq::centroids::centroid_sums));
  m.impl("assign_and_sum", TORCH_BOX(&clusterq::centroids::assign_and_sum));
  m.impl("move_centroids_", TORCH_BOX(&clusterq::centroids::move_centroids_));
}
