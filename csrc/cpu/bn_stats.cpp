// Forward kernels of clusterq/ops/bn_stats.py: ordered merges of a table of moments.
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "cpu/bn_stats_moments.h"

namespace clusterq::bn_stats {
namespace {

// Parts per image that keep all shards busy on few, large, channels-innermost images.
int64_t instance_parts(const View& x) {
  if (!x.rows || x.images == 0 || x.images >= kShards) return 1;
  return std::clamp<int64_t>(ceil_div(x.spatial, block_rows(x.channels)), 1, ceil_div(kShards, x.images));
}

void merge(double count_a, double* mean_a, double* m2_a, double count_b, const double* mean_b, const double* m2_b,
           int64_t channels) {
  if (count_a == 0) {
    std::copy_n(mean_b, channels, mean_a);
    std::copy_n(m2_b, channels, m2_a);
  } else {
    kernels<float>().merge(channels, count_a, mean_a, m2_a, count_b, mean_b, m2_b);
  }
}

// Merges the parts of every image into its first one.
void merge_parts(const View& x, Table& table) {
  for (int64_t segment = 0; segment < table.segments; ++segment) {
    const int64_t first = segment - segment % table.parts, count = table.count(segment, x.spatial);
    if (segment == first || count == 0) continue;
    const int64_t to = first * x.channels, from = segment * x.channels;
    merge(static_cast<double>(table.begin(segment)), table.mean.get() + to, table.m2.get() + to,
          static_cast<double>(count), table.mean.get() + from, table.m2.get() + from, x.channels);
  }
}

// Weights of the images, or 1 for each; images of weight 0 are left out of every merge.
class Weights {
 public:
  Weights(const View& x, const std::optional<Tensor>& weights) {
    if (!weights.has_value()) return;
    check_dtype(*weights, statistics_dtype(x), "weights");
    check_sizes(*weights, {x.images}, "weights");
    const Tensor given = packed(*weights);
    values_.resize(x.images);
    for (int64_t n = 0; n < x.images; ++n) {
      values_[n] = given.scalar_type() == ScalarType::Double ? static_cast<const double*>(given.const_data_ptr())[n]
                                                             : static_cast<const float*>(given.const_data_ptr())[n];
    }
  }
  double operator[](int64_t n) const { return values_.empty() ? 1.0 : values_[n]; }

 private:
  std::vector<double> values_;
};

// Merges the images n of positive weight into `mean` and `m2` [C]; returns the sum of the weights. M2 of an image
// counts as often as the image.
double merge_weighted(const View& x, const Table& table, const Weights& weights, const std::vector<int64_t>& images,
                      double* mean, double* m2) {
  const int64_t row = table.parts * x.channels, width = x.channels;
  const auto spatial = static_cast<double>(x.spatial);
  std::vector<double> scaled(width);
  double total = 0;
  std::fill_n(mean, width, 0.0);
  std::fill_n(m2, width, 0.0);
  for (const int64_t n : images) {
    const double weight = weights[n];
    if (weight == 0) continue;
    const double *m = table.mean.get() + n * row, *q = table.m2.get() + n * row;
    if (weight != 1) {
      for (int64_t c = 0; c < width; ++c) scaled[c] = weight * q[c];
      q = scaled.data();
    }
    merge(spatial * total, mean, m2, spatial * weight, m, q, width);
    total += weight;
  }
  return total;
}

// Merges all images into the first one.
void merge_images(const View& x, Table& table) {
  const int64_t chunk = 64, chunks = ceil_div(x.channels, chunk);
  const auto spatial = static_cast<double>(x.spatial);
  torch::stable::parallel_for(0, chunks, grain(x, chunks), [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * chunk, width = std::min(end * chunk, x.channels) - c0;
    for (int64_t n = 1; n < x.images; ++n) {
      const int64_t from = n * table.parts * x.channels + c0;
      merge(spatial * static_cast<double>(n), table.mean.get() + c0, table.m2.get() + c0, spatial,
            table.mean.get() + from, table.m2.get() + from, width);
    }
  });
}

void write(const Tensor& out, int64_t at, const double* values, int64_t count, double divisor) {
  if (out.scalar_type() == ScalarType::Double) {
    double* p = static_cast<double*>(out.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < count; ++i) p[i] = values[i] / divisor;
  } else {
    float* p = static_cast<float*>(out.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(values[i] / divisor);
  }
}

// Mean and biased variance of every image into rows of `mean` and `var`, `stride` elements long, from column c0 on.
void write_instances(const View& x, Table& table, const Tensor& mean, const Tensor& var, int64_t stride, int64_t c0) {
  merge_parts(x, table);
  const int64_t row = table.parts * x.channels, shards = std::min(x.images, kShards);
  if (x.images * x.channels == 0) return;
  const int64_t per_shard = ceil_div(x.images, shards);
  torch::stable::parallel_for(0, shards, grain(x, shards), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * per_shard; n < std::min(end * per_shard, x.images); ++n) {
      write(mean, n * stride + c0, table.mean.get() + n * row, x.channels, 1);
      write(var, n * stride + c0, table.m2.get() + n * row, x.channels, static_cast<double>(x.spatial));
    }
  });
}

// One value per image and channel: it is the mean, of variance 0, but not finite where x is not.
void write_single(const View& x, const Tensor& mean, const Tensor& var, int64_t stride, int64_t c0) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    using E = Compute<T>;
    const T* data = x.data<T>();
    auto* m = static_cast<E*>(mean.mutable_data_ptr()) + c0;
    auto* v = static_cast<E*>(var.mutable_data_ptr()) + c0;
    const int64_t per_task = std::max<int64_t>(1, x.numel() < 32768 ? x.images : ceil_div(x.images, kShards));
    torch::stable::parallel_for(0, x.images, per_task, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = 0; c < x.channels; ++c) {
          const E value = load<E>(data[n * x.channels + c]);
          m[n * stride + c] = value;
          v[n * stride + c] = value - value;
        }
      }
    });
  });
}

// Statistics of every image into rows of `mean` and `var`, and y where asked.
void instances(const View& x, const Tensor* y, const Parameters* parameters, const Tensor& mean, const Tensor& var,
               int64_t stride, int64_t c0) {
  if (x.spatial == 1) {
    if (y != nullptr) normalize_rows(x, *y, *parameters);
    write_single(x, mean, var, stride, c0);
    return;
  }
  Table table = moments(x, instance_parts(x), y, parameters);
  write_instances(x, table, mean, var, stride, c0);
}

std::tuple<Tensor, Tensor> instance_statistics(const Tensor& tensor) {
  const View x = view(tensor);
  Tensor mean = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  Tensor var = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  instances(x, nullptr, nullptr, mean, var, x.channels, 0);
  return {mean, var};
}

std::tuple<Tensor, Tensor> instance_statistics_list(std::vector<Tensor> tensors) {
  CLUSTERQ_CHECK(!tensors.empty(), "xs is empty");
  std::vector<View> layers;
  int64_t columns = 0;
  for (const Tensor& tensor : tensors) {
    layers.push_back(view(tensor));
    const View &x = layers.back(), &first = layers.front();
    CLUSTERQ_CHECK(x.images == first.images && x.tensor.scalar_type() == first.tensor.scalar_type(),
                   "xs must have one dtype and one number of images");
    columns += x.channels;
  }
  const View& first = layers.front();
  Tensor mean = torch::stable::new_empty(first.tensor, {first.images, columns}, statistics_dtype(first));
  Tensor var = torch::stable::new_empty(first.tensor, {first.images, columns}, statistics_dtype(first));
  int64_t c0 = 0;
  for (const View& x : layers) {
    instances(x, nullptr, nullptr, mean, var, columns, c0);
    c0 += x.channels;
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_instance_statistics(const Tensor& tensor,
                                                                  const std::optional<Tensor>& weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const Tensor& running_mean, const Tensor& running_var,
                                                                  double eps) {
  const View x = view(tensor);
  const Tensor y = empty_like(x);
  const Parameters parameters = parameters_of(x, weight, bias, running_mean, running_var, eps);
  const Tensor mean = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  const Tensor var = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  instances(x, &y, &parameters, mean, var, x.channels, 0);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_moments(View x, int64_t correction, const Tensor* y, const Parameters* parameters) {
  const int64_t channels = x.channels, values = x.images * x.spatial;
  const Tensor mean = torch::stable::new_empty(x.tensor, {channels}, statistics_dtype(x));
  const Tensor var = torch::stable::new_empty(x.tensor, {channels}, statistics_dtype(x));
  // Planes too short for a register are channels of their own until the end.
  int64_t group = 1;
  if (y == nullptr && !x.rows && x.spatial > 0 && x.spatial < 16) {
    group = x.spatial;
    x = View{x.tensor, x.images, channels * group, 1, true};
  }
  int64_t parts = 1;
  if (x.rows) {
    x.spatial *= x.images;
    x.images = 1;
    parts = std::clamp<int64_t>(ceil_div(x.spatial, block_rows(x.channels)), 1, 4 * kShards);
  }
  std::vector<double> total_mean(channels, std::nan("")), total_m2(channels, 0.0);
  const int64_t images = values > 0 && channels > 0 ? images_per_group(x) : 1;
  if (images > 1) {
    const Table table = grouped_moments(x, images, y, parameters);
    std::copy_n(table.mean.get(), channels, total_mean.data());
    std::copy_n(table.m2.get(), channels, total_m2.data());
  } else if (values > 0 && channels > 0) {
    Table table = moments(x, parts, y, parameters);
    merge_parts(x, table);
    merge_images(x, table);
    for (int64_t c = 0; c < channels; ++c) {
      double* m = table.mean.get() + c * group;
      double* q = table.m2.get() + c * group;
      const auto count = static_cast<double>(values / group);
      for (int64_t i = 1; i < group; ++i) merge(count * static_cast<double>(i), m, q, count, m + i, q + i, 1);
      total_mean[c] = *m;
      total_m2[c] = *q;
    }
  }
  const double divisor = values > correction ? static_cast<double>(values - correction) : std::nan("");
  write(mean, 0, total_mean.data(), channels, 1);
  write(var, 0, total_m2.data(), channels, divisor);
  return {mean, var};
}

// From the moments of every image.
std::tuple<Tensor, Tensor> weighted_statistics(const View& x, int64_t correction, const Weights& weights) {
  const Tensor mean = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  const Tensor var = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  Table table = moments(x, instance_parts(x), nullptr, nullptr);
  merge_parts(x, table);
  std::vector<int64_t> images(x.images);
  std::iota(images.begin(), images.end(), int64_t(0));
  std::vector<double> total_mean(x.channels), total_m2(x.channels);
  const double total = merge_weighted(x, table, weights, images, total_mean.data(), total_m2.data());
  const double values = total * static_cast<double>(x.spatial), free = values - static_cast<double>(correction);
  if (!(values > 0)) std::fill(total_mean.begin(), total_mean.end(), std::nan(""));
  write(mean, 0, total_mean.data(), x.channels, 1);
  write(var, 0, total_m2.data(), x.channels, free > 0 ? free : std::nan(""));
  return {mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& tensor, int64_t correction,
                                                 const std::optional<Tensor>& weights) {
  const View x = view(tensor);
  if (weights.has_value()) return weighted_statistics(x, correction, Weights(x, weights));
  return batch_moments(x, correction, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_batch_statistics(const Tensor& tensor,
                                                               const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias,
                                                               const Tensor& running_mean, const Tensor& running_var,
                                                               double eps) {
  const View x = view(tensor);
  const Tensor y = empty_like(x);
  const Parameters parameters = parameters_of(x, weight, bias, running_mean, running_var, eps);
  auto [mean, var] = batch_moments(x, 0, &y, &parameters);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_statistics(const Tensor& tensor, const Tensor& labels,
                                                            int64_t num_classes,
                                                            const std::optional<Tensor>& image_weights) {
  const View x = view(tensor);
  check_dtype(labels, ScalarType::Long, "labels");
  check_sizes(labels, {x.images}, "labels");
  const Tensor index = packed(labels);
  const auto* label = static_cast<const int64_t*>(index.const_data_ptr());
  const Weights weights(x, image_weights);

  Table table = moments(x, instance_parts(x), nullptr, nullptr);
  merge_parts(x, table);
  std::vector<std::vector<int64_t>> members(num_classes);
  for (int64_t n = 0; n < x.images; ++n) {
    if (label[n] >= 0 && label[n] < num_classes && weights[n] != 0) members[label[n]].push_back(n);
  }

  const Tensor count = torch::stable::new_empty(x.tensor, {num_classes}, ScalarType::Long);
  const Tensor total = torch::stable::new_empty(x.tensor, {num_classes}, statistics_dtype(x));
  const Tensor mean = torch::stable::new_empty(x.tensor, {num_classes, x.channels}, statistics_dtype(x));
  const Tensor var = torch::stable::new_empty(x.tensor, {num_classes, x.channels}, statistics_dtype(x));
  auto* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  torch::stable::parallel_for(0, num_classes, grain(x, num_classes), [&](int64_t begin, int64_t end) {
    std::vector<double> m(x.channels), q(x.channels);
    for (int64_t k = begin; k < end; ++k) {
      counts[k] = static_cast<int64_t>(members[k].size());
      const double sum = merge_weighted(x, table, weights, members[k], m.data(), q.data());
      write(total, k, &sum, 1, 1);
      write(mean, k * x.channels, m.data(), x.channels, 1);
      write(var, k * x.channels, q.data(), x.channels, counts[k] > 0 ? sum * static_cast<double>(x.spatial) : 1);
    }
  });
  return {count, total, mean, var};
}

}  // namespace
}  // namespace clusterq::bn_stats

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  using namespace clusterq::bn_stats;
  m.impl("instance_statistics", TORCH_BOX(&instance_statistics));
  m.impl("instance_statistics_list", TORCH_BOX(&instance_statistics_list));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("class_statistics", TORCH_BOX(&class_statistics));
  m.impl("batch_norm_batch_statistics", TORCH_BOX(&batch_norm_batch_statistics));
  m.impl("batch_norm_instance_statistics", TORCH_BOX(&batch_norm_instance_statistics));
}
