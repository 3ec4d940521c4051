// Backward kernels of clusterq/ops/bn_stats.py: one affine pass for the input, one reduction for weight and bias.
#include <tuple>

#include "cpu/bn_stats.h"

namespace clusterq::bn_stats {
namespace {

// out = a * (x - center) + b, plus scale * grad where grad is given; center, a and b hold 1 or N rows each.
Tensor affine(const Tensor* grad, const Tensor& tensor, const Tensor* scale, const Tensor& center, const Tensor& a,
              const Tensor& b) {
  const View x = view(tensor);
  const Tensor out = empty_like(x);
  if (x.numel() == 0) return out;
  const Tensor incoming = grad == nullptr ? x.tensor : in_order_of(x, *grad, "grad");
  const Tensor arguments[] = {per_image(x, center, "center"), per_image(x, a, "a"), per_image(x, b, "b"),
                              scale == nullptr ? per_image(x, center, "center") : per_channel(x, *scale, "scale")};
  const int64_t channels = x.channels, image = channels * x.spatial;
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    using E = Compute<T>;
    const Kernels<T>& table = kernels<T>();
    const T* data = x.data<T>();
    const T* g = grad == nullptr ? nullptr : static_cast<const T*>(incoming.const_data_ptr());
    T* o = static_cast<T*>(out.mutable_data_ptr());
    const E* values[4];
    int64_t step[4];
    bool shared = true;
    for (int i = 0; i < 4; ++i) {
      values[i] = static_cast<const E*>(arguments[i].const_data_ptr());
      step[i] = arguments[i].numel() == channels ? 0 : channels;
      shared = shared && step[i] == 0;
    }
    if (x.rows && shared) {
      const int64_t f = fold(channels), block = block_rows(channels) / f * f, rows = x.images * x.spatial;
      std::vector<E> folded(4 * f * channels);
      for (int i = 0; i < 4; ++i) repeat(values[i], channels, f, folded.data() + i * f * channels);
      const E* p = folded.data();
      const int64_t stride = std::max(f, block), blocks = ceil_div(rows, stride), w = f * channels;
      torch::stable::parallel_for(0, blocks, grain(x, blocks), [&](int64_t begin, int64_t end) {
        const int64_t r = begin * stride, count = std::min(end * stride, rows) - r, at = r * channels;
        table.row_affine(data + at, g == nullptr ? nullptr : g + at, o + at, count, channels, f, p, p + w, p + 2 * w,
                         p + 3 * w);
      });
      return;
    }
    const int64_t f = x.rows ? std::min(fold(channels), std::max<int64_t>(1, x.spatial)) : 1;
    const int64_t images_per_task = std::max<int64_t>(1, 8192 / image), tasks = ceil_div(x.images, images_per_task);
    torch::stable::parallel_for(0, tasks, grain(x, tasks), [&](int64_t begin, int64_t end) {
      std::vector<E> folded(4 * f * channels);
      for (int64_t n = begin * images_per_task; n < std::min(end * images_per_task, x.images); ++n) {
        const E* p[4];
        for (int i = 0; i < 4; ++i) {
          p[i] = values[i] + n * step[i];
          if (f > 1) {
            repeat(p[i], channels, f, folded.data() + i * f * channels);
            p[i] = folded.data() + i * f * channels;
          }
        }
        const T* gn = g == nullptr ? nullptr : g + n * image;
        if (x.rows) {
          table.row_affine(data + n * image, gn, o + n * image, x.spatial, channels, f, p[0], p[1], p[2], p[3]);
        } else {
          table.plane_affine(data + n * image, gn, o + n * image, channels, x.spatial, p[0], p[1], p[2], p[3]);
        }
      }
    });
  });
  return out;
}

Tensor statistics_backward(const Tensor& x, const Tensor& center, const Tensor& a, const Tensor& b) {
  return affine(nullptr, x, nullptr, center, a, b);
}

Tensor batch_norm_statistics_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& center,
                                      const Tensor& a, const Tensor& b) {
  return affine(&grad, x, &scale, center, a, b);
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

std::tuple<Tensor, Tensor> batch_norm_parameter_backward(const Tensor& grad, const Tensor& tensor, const Tensor& center,
                                                         const Tensor& inv_std) {
  const View x = view(tensor);
  const Tensor g = in_order_of(x, grad, "grad");
  const Tensor m = per_channel(x, center, "center"), s = per_channel(x, inv_std, "inv_std");
  const Tensor dweight = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  const Tensor dbias = torch::stable::new_empty(x.tensor, {x.channels}, statistics_dtype(x));
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    using E = Compute<T>;
    const int64_t items = x.rows ? x.images * x.spatial : x.images;
    const int64_t shards = std::max<int64_t>(1, std::min(items, kShards)), per_shard = ceil_div(items, shards);
    std::vector<double> sums(2 * shards * x.channels, 0.0);
    const auto* mean = static_cast<const E*>(m.const_data_ptr());
    const auto* inverse = static_cast<const E*>(s.const_data_ptr());
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
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&batch_norm_statistics_backward));
  m.impl("batch_norm_parameter_backward", TORCH_BOX(&batch_norm_parameter_backward));
}
