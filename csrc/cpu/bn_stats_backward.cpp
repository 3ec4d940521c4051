// Backward kernels of clusterq/ops/bn_stats.py: one affine pass for the input, one reduction for weight and bias.
#include <tuple>

#include "cpu/bn_stats.h"

namespace clusterq::bn_stats {
namespace {

// Gradients of statistics: a = var * var_factor and b = mean * mean_factor, 0 where they are absent.
struct Gradients {
  const std::optional<Tensor>&mean, &var;
  double mean_factor, var_factor;
};

// The coefficients of one image, or of all: rows of fold * C in the order center, a, b.
template <class E>
class Coefficients {
 public:
  Coefficients(const View& x, const Rows& center, const Gradients& grads)
      : channels_(x.channels),
        mean_factor_(static_cast<E>(grads.mean_factor)),
        var_factor_(static_cast<E>(grads.var_factor)),
        center_(center) {
    if (grads.mean.has_value()) mean_ = rows_of(x, *grads.mean, "grad_mean");
    if (grads.var.has_value()) var_ = rows_of(x, *grads.var, "grad_var");
  }

  // Whether all images have the same.
  bool shared() const {
    return center_.step == 0 && (!mean_.has_value() || mean_->step == 0) && (!var_.has_value() || var_->step == 0);
  }

  void fill(int64_t n, int64_t fold, E* out) const {
    const int64_t width = fold * channels_;
    std::copy_n(center_.row<E>(n), channels_, out);
    scaled(var_, n, var_factor_, out + width);
    scaled(mean_, n, mean_factor_, out + 2 * width);
    for (int i = 0; i < 3; ++i) repeat(out + i * width, channels_, fold, out + i * width);
  }

 private:
  void scaled(const std::optional<Rows>& rows, int64_t n, E factor, E* out) const {
    if (!rows.has_value()) {
      std::fill_n(out, channels_, E(0));
      return;
    }
    const E* values = rows->row<E>(n);
    for (int64_t c = 0; c < channels_; ++c) out[c] = values[c] * factor;
  }

  int64_t channels_;
  E mean_factor_, var_factor_;
  Rows center_;
  std::optional<Rows> mean_, var_;
};

// dx = a * (x - center) + b, plus scale * g where g is given; `scale` holds C values.
template <class T>
void affine(const View& x, const T* g, T* out, const Compute<T>* scale, const Coefficients<Compute<T>>& own) {
  using E = Compute<T>;
  const Kernels<T>& table = kernels<T>();
  const int64_t channels = x.channels, image = channels * x.spatial;
  const T* data = x.data<T>();
  const int64_t f =
      !x.rows ? 1 : std::min(fold(channels), std::max<int64_t>(1, own.shared() ? x.images * x.spatial : x.spatial));
  const int64_t w = f * channels;
  std::vector<E> scales(w);
  if (scale != nullptr) {
    std::copy_n(scale, channels, scales.data());
    repeat(scales.data(), channels, f, scales.data());
  }
  if (x.rows && own.shared()) {
    const int64_t block = std::max(f, block_rows(channels) / f * f), rows = x.images * x.spatial;
    const int64_t blocks = ceil_div(rows, block);
    std::vector<E> p(3 * w);
    own.fill(0, f, p.data());
    torch::stable::parallel_for(0, blocks, grain(x, blocks), [&](int64_t begin, int64_t end) {
      const int64_t r = begin * block, count = std::min(end * block, rows) - r, at = r * channels;
      table.row_affine(data + at, g == nullptr ? nullptr : g + at, out + at, count, channels, f, p.data(), p.data() + w,
                       p.data() + 2 * w, scales.data());
    });
    return;
  }
  const int64_t images_per_task = std::max<int64_t>(1, 8192 / image), tasks = ceil_div(x.images, images_per_task);
  torch::stable::parallel_for(0, tasks, grain(x, tasks), [&](int64_t begin, int64_t end) {
    std::vector<E> p(3 * w);
    const int64_t first = begin * images_per_task;
    for (int64_t n = first; n < std::min(end * images_per_task, x.images); ++n) {
      if (n == first || !own.shared()) own.fill(n, f, p.data());
      const T* gn = g == nullptr ? nullptr : g + n * image;
      if (x.rows) {
        table.row_affine(data + n * image, gn, out + n * image, x.spatial, channels, f, p.data(), p.data() + w,
                         p.data() + 2 * w, scales.data());
      } else {
        table.plane_affine(data + n * image, gn, out + n * image, channels, x.spatial, p.data(), p.data() + w,
                           p.data() + 2 * w, scales.data());
      }
    }
  });
}

Tensor statistics_backward(const Tensor& tensor, const Tensor& center, const std::optional<Tensor>& grad_mean,
                           const std::optional<Tensor>& grad_var, double mean_factor, double var_factor) {
  const View x = view(tensor);
  const Tensor out = empty_like(x);
  if (x.numel() == 0) return out;
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const Coefficients<Compute<T>> own(x, rows_of(x, center, "center"), {grad_mean, grad_var, mean_factor, var_factor});
    affine<T>(x, nullptr, static_cast<T*>(out.mutable_data_ptr()), nullptr, own);
  });
  return out;
}

// Columns [begin, end) of [N, D].
std::optional<Tensor> columns(const std::optional<Tensor>& matrix, int64_t begin, int64_t end) {
  if (!matrix.has_value()) return std::nullopt;
  return torch::stable::narrow(const_cast<Tensor&>(*matrix), 1, begin, end - begin);
}

std::vector<Tensor> statistics_backward_list(std::vector<Tensor> xs, const Tensor& center,
                                             const std::optional<Tensor>& grad_mean,
                                             const std::optional<Tensor>& grad_var) {
  std::vector<Tensor> results;
  int64_t total = 0;
  for (const Tensor& x : xs) total += x.size(1);
  CLUSTERQ_CHECK(center.dim() == 2 && center.size(1) == total, "center must have one column per channel of xs");
  int64_t begin = 0;
  for (const Tensor& x : xs) {
    const int64_t end = begin + x.size(1);
    const View layer = view(x);
    const double factor = layer.spatial > 0 ? 1.0 / static_cast<double>(layer.spatial) : std::nan("");
    results.push_back(statistics_backward(x, *columns(center, begin, end), columns(grad_mean, begin, end),
                                          columns(grad_var, begin, end), factor, 2 * factor));
    begin = end;
  }
  return results;
}

Tensor batch_norm_statistics_backward(const Tensor& grad, const Tensor& tensor, const std::optional<Tensor>& weight,
                                      const Tensor& running_var, double eps, const Tensor& center,
                                      const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_var,
                                      double mean_factor, double var_factor) {
  const View x = view(tensor);
  const Tensor out = empty_like(x), incoming = in_order_of(x, grad, "grad");
  if (x.numel() == 0) return out;
  const Parameters parameters = parameters_of(x, weight, std::nullopt, running_var, running_var, eps);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    using E = Compute<T>;
    const std::vector<E> scale = scales<E>(x.channels, parameters.weight, parameters.running_var, eps);
    const Coefficients<E> own(x, rows_of(x, center, "center"), {grad_mean, grad_var, mean_factor, var_factor});
    const T* g = static_cast<const T*>(incoming.const_data_ptr());
    T* o = static_cast<T*>(out.mutable_data_ptr());
    if (x.rows && !grad_mean.has_value() && !grad_var.has_value()) {
      // BatchNorm's own gradient, without x.
      const std::vector<E> zero(x.channels, E(0));
      scale_rows<T>(x, g, o, zero.data(), scale.data(), zero.data());
    } else {
      affine<T>(x, g, o, scale.data(), own);
    }
  });
  return out;
}

// Sums over images [n0, n1), or rows where channels are innermost, added to sum_grad [C] and sum_dot [C].
template <class T>
void reduce(const View& x, const T* g, const Compute<T>* center, int64_t n0, int64_t n1, double* sum_grad,
            double* sum_dot) {
  using E = Compute<T>;
  const int64_t channels = x.channels, f = x.rows ? fold(channels) : 1;
  std::vector<E> s1(f * channels + 16), s2(f * channels + 16), folded(f * channels);
  const Kernels<T>& table = kernels<T>();
  const auto flush = [&] {
    for (int64_t c = 0; c < channels; ++c) {
      sum_grad[c] += s1[c];
      sum_dot[c] += s2[c];
    }
  };
  const T* data = x.data<T>();
  if (x.rows) {
    repeat(center, channels, f, folded.data());
    const int64_t block = block_rows(channels);
    for (int64_t r = n0; r < n1; r += block) {
      const int64_t at = r * channels;
      table.row_dot(data + at, g + at, std::min(block, n1 - r), channels, f, folded.data(), s1.data(), s2.data());
      flush();
    }
    return;
  }
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t i = 0; i < x.spatial; i += kRun) {
      const int64_t at = n * channels * x.spatial + i;
      table.plane_dot(data + at, g + at, channels, x.spatial, std::min(kRun, x.spatial - i), center, s1.data(),
                      s2.data());
      flush();
    }
  }
}

std::tuple<Tensor, Tensor> batch_norm_parameter_backward(const Tensor& grad, const Tensor& tensor,
                                                         const Tensor& running_mean, const Tensor& running_var,
                                                         double eps) {
  const View x = view(tensor);
  const Tensor g = in_order_of(x, grad, "grad");
  const Parameters parameters = parameters_of(x, std::nullopt, std::nullopt, running_mean, running_var, eps);
  const Tensor dweight = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  const Tensor dbias = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    using E = Compute<T>;
    const int64_t items = x.rows ? x.images * x.spatial : x.images;
    const int64_t shards = std::max<int64_t>(1, std::min(items, kShards)), per_shard = ceil_div(items, shards);
    std::vector<double> sums(2 * shards * x.channels, 0.0);
    const auto* mean = static_cast<const E*>(parameters.center.const_data_ptr());
    const std::vector<E> inverse = scales<E>(x.channels, std::nullopt, parameters.running_var, eps);
    if (x.numel() > 0) {
      torch::stable::parallel_for(0, shards, grain(x, shards), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          double* own = sums.data() + 2 * k * x.channels;
          reduce<T>(x, static_cast<const T*>(g.const_data_ptr()), mean, k * per_shard,
                    std::min((k + 1) * per_shard, items), own, own + x.channels);
        }
      });
    }
    auto* weight = static_cast<E*>(dweight.mutable_data_ptr());
    auto* bias = static_cast<E*>(dbias.mutable_data_ptr());
    for (int64_t c = 0; c < x.channels; ++c) {
      double first = 0, second = 0;
      for (int64_t k = 0; k < shards; ++k) {
        first += sums[2 * k * x.channels + c];
        second += sums[(2 * k + 1) * x.channels + c];
      }
      bias[c] = static_cast<E>(first);
      weight[c] = static_cast<E>(second * inverse[c]);
    }
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace clusterq::bn_stats

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  using namespace clusterq::bn_stats;
  m.impl("statistics_backward", TORCH_BOX(&statistics_backward));
  m.impl("statistics_backward_list", TORCH_BOX(&statistics_backward_list));
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&batch_norm_statistics_backward));
  m.impl("batch_norm_parameter_backward", TORCH_BOX(&batch_norm_parameter_backward));
}
