// One pass over x: moments of every segment and channel.
#include "cpu/bn_stats_moments.h"

#include <cmath>
#include <limits>

namespace clusterq::bn_stats {
namespace {

// The eval-mode BatchNorm that rides on the pass; per-channel pointers, null where statistics alone are wanted.
template <class T>
struct Norm {
  T* y = nullptr;
  const Compute<T>*center = nullptr, *scale = nullptr, *bias = nullptr;
};

template <class T>
class Pass {
 public:
  using E = Compute<T>;

  Pass(const View& x, Table& table, const Norm<T>& norm) : x_(x), table_(table), norm_(norm), data_(x.data<T>()) {
    if (x.rows) {
      fold_ = fold(x.channels);
      block_ = block_rows(x.channels);
      if (norm.y != nullptr) {
        folded_.resize(3 * fold_ * x.channels);
        E* out = folded_.data();
        for (const E** source : {&norm_.center, &norm_.scale, &norm_.bias}) {
          repeat(*source, x.channels, fold_, out);
          *source = out;
          out += fold_ * x.channels;
        }
      }
    }
  }

  void run() {
    if (x_.spatial == 1) {
      single();
      return;
    }
    const int64_t shards = std::min(table_.segments, kShards);
    const int64_t splits = x_.rows ? 1 : std::min(ceil_div(kShards, shards), ceil_div(x_.channels, 16));
    const int64_t units = shards * splits, per_shard = ceil_div(table_.segments, shards);
    const int64_t per_split = ceil_div(x_.channels, splits);
    torch::stable::parallel_for(0, units, grain(x_, units), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t s0 = unit / splits * per_shard, c0 = unit % splits * per_split;
        range(s0, std::min(s0 + per_shard, table_.segments), c0, std::min(c0 + per_split, x_.channels));
      }
    });
  }

 private:
  // One value per image and channel: nothing to sum.
  void single() {
    const int64_t tasks = std::min(x_.images, kShards), per_task = ceil_div(x_.images, tasks);
    torch::stable::parallel_for(0, tasks, grain(x_, tasks), [&](int64_t begin, int64_t end) {
      const int64_t n = begin * per_task, count = std::min(end * per_task, x_.images) - n, at = n * x_.channels;
      if (count <= 0) return;
      for (int64_t i = at; i < at + count * x_.channels; ++i) {
        const double value = clusterq::load<E>(data_[i]);
        table_.mean[i] = value;
        // Zero, but not finite where x is not.
        table_.m2[i] = value - value;
      }
      if (norm_.y != nullptr) {
        kernels_.row_scale(data_ + at, norm_.y + at, count, x_.channels, fold_, norm_.center, norm_.scale, norm_.bias);
      }
    });
  }

  // Element (segment, channel c, position i) without the offset of i.
  int64_t at(int64_t segment, int64_t c) const {
    const int64_t image = segment / table_.parts * x_.channels * x_.spatial;
    return x_.rows ? image + table_.begin(segment) * x_.channels + c : image + c * x_.spatial;
  }

  // Segments [s0, s1) of channels [c0, c1), in order: the shift of a block follows the means of those before it.
  void range(int64_t s0, int64_t s1, int64_t c0, int64_t c1) {
    const int64_t width = c1 - c0, step_of_position = x_.rows ? x_.channels : 1;
    if (s0 >= s1 || width <= 0) return;
    std::vector<E> shift(width * fold_), first(width * fold_ + 16), second(width * fold_ + 16);
    std::vector<double> mean(width), m2(width);
    std::vector<int32_t> suspects(width + 1);
    // A short run at the start is a good enough first shift.
    const int64_t pilot = std::min<int64_t>(table_.count(s0, x_.spatial), x_.rows ? 32 : 64);
    sums(at(s0, c0), pilot, width, shift.data(), first.data(), second.data());
    kernels_.finish(width, static_cast<double>(pilot), shift.data(), first.data(), second.data(), mean.data(),
                    m2.data(), suspects.data());
    std::copy_n(mean.data(), width, shift.data());
    for (int64_t segment = s0; segment < s1; ++segment) {
      const int64_t count = table_.count(segment, x_.spatial);
      double* whole_mean = table_.mean.get() + segment * x_.channels + c0;
      double* whole_m2 = table_.m2.get() + segment * x_.channels + c0;
      const int64_t step = x_.rows ? block_ : kRun;
      for (int64_t i = 0; i < count; i += step) {
        double* block_mean = i == 0 ? whole_mean : mean.data();
        double* block_m2 = i == 0 ? whole_m2 : m2.data();
        const int64_t length = std::min(step, count - i);
        const int64_t start = at(segment, c0) + i * step_of_position;
        block(start, length, c0, width, shift.data(), first.data(), second.data());
        const int64_t found = kernels_.finish(width, static_cast<double>(length), shift.data(), first.data(),
                                              second.data(), block_mean, block_m2, suspects.data());
        for (int64_t k = 0; k < found; ++k) {
          const int64_t c = suspects[k];
          kernels_.exact(data_ + start + c * (x_.rows ? 1 : x_.spatial), length, step_of_position, block_mean + c,
                         block_m2 + c);
          shift[c] = static_cast<E>(block_mean[c]);
        }
        for (int64_t c = 0; c < width; ++c) shift[c] += static_cast<E>(0.25 * (block_mean[c] - shift[c]));
        if (i > 0) {
          kernels_.merge(width, static_cast<double>(i), whole_mean, whole_m2, static_cast<double>(length), block_mean,
                         block_m2);
        }
      }
    }
  }

  void sums(int64_t start, int64_t length, int64_t width, E* shift, E* s1, E* s2) const {
    if (x_.rows) {
      repeat(shift, width, fold_, shift);
      kernels_.row_sums(data_ + start, length, width, fold_, shift, s1, s2);
    } else {
      kernels_.plane_sums(data_ + start, width, x_.spatial, length, shift, s1, s2);
    }
  }

  void block(int64_t start, int64_t length, int64_t c0, int64_t width, E* shift, E* s1, E* s2) const {
    if (norm_.y == nullptr) {
      sums(start, length, width, shift, s1, s2);
    } else if (x_.rows) {
      repeat(shift, width, fold_, shift);
      kernels_.row_norm(data_ + start, norm_.y + start, length, width, fold_, shift, norm_.center, norm_.scale,
                        norm_.bias, s1, s2);
    } else {
      kernels_.plane_norm(data_ + start, norm_.y + start, width, x_.spatial, length, shift, norm_.center + c0,
                          norm_.scale + c0, norm_.bias + c0, s1, s2);
    }
  }

  const View& x_;
  Table& table_;
  Norm<T> norm_;
  const T* data_;
  const Kernels<T>& kernels_ = kernels<T>();
  std::vector<E> folded_;
  int64_t fold_ = 1, block_ = kRun;
};

// The parameters of BatchNorm in E, kept alive by `scale` and `zero`.
template <class T>
Norm<T> norm_of(const View& x, const Tensor* y, const Parameters* parameters, std::vector<Compute<T>>& scale,
                std::vector<Compute<T>>& zero) {
  using E = Compute<T>;
  Norm<T> norm;
  if (y == nullptr) return norm;
  scale = scales<E>(x.channels, parameters->weight, parameters->running_var, parameters->eps);
  if (!parameters->bias.has_value()) zero.assign(x.channels, E(0));
  norm.y = static_cast<T*>(y->mutable_data_ptr());
  norm.center = static_cast<const E*>(parameters->center.const_data_ptr());
  norm.scale = scale.data();
  norm.bias = zero.empty() ? static_cast<const E*>(parameters->bias->const_data_ptr()) : zero.data();
  return norm;
}

}  // namespace

Table moments(const View& x, int64_t parts, const Tensor* y, const Parameters* parameters) {
  Table table(x, parts);
  if (x.spatial == 0) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(table.mean.get(), table.segments * table.channels, nan);
    std::fill_n(table.m2.get(), table.segments * table.channels, nan);
  } else if (x.numel() > 0) {
    dispatch(x, [&](auto element) {
      using T = decltype(element);
      std::vector<Compute<T>> scale, zero;
      const Norm<T> norm = norm_of<T>(x, y, parameters, scale, zero);
      Pass<T>(x, table, norm).run();
    });
  }
  return table;
}

namespace {

// Groups of images: sums of a channel run over all planes of a group before they are looked at.
template <class T>
class GroupedPass {
 public:
  using E = Compute<T>;

  GroupedPass(const View& x, int64_t group, Table& table, const Norm<T>& norm)
      : x_(x), group_(group), table_(table), norm_(norm), data_(x.data<T>()) {}

  void run() {
    const int64_t shards = std::min(table_.segments, kShards), per_shard = ceil_div(table_.segments, shards);
    torch::stable::parallel_for(0, shards, grain(x_, shards), [&](int64_t begin, int64_t end) {
      for (int64_t shard = begin; shard < end; ++shard)
        range(shard * per_shard, std::min((shard + 1) * per_shard, table_.segments));
    });
  }

 private:
  void range(int64_t s0, int64_t s1) {
    if (s0 >= s1) return;
    const int64_t channels = x_.channels, spatial = x_.spatial, image = channels * spatial;
    std::vector<E> shift(channels), first(channels), second(channels), lanes(2 * 64 * (64 / sizeof(E)));
    std::vector<int32_t> suspects(channels + 1);
    // The first image is a good enough first shift.
    double* mean = table_.mean.get() + s0 * channels;
    double* m2 = table_.m2.get() + s0 * channels;
    kernels_.plane_sums(data_ + s0 * group_ * image, channels, spatial, spatial, shift.data(), first.data(),
                        second.data());
    kernels_.finish(channels, static_cast<double>(spatial), shift.data(), first.data(), second.data(), mean, m2,
                    suspects.data());
    std::copy_n(mean, channels, shift.data());
    for (int64_t segment = s0; segment < s1; ++segment, mean += channels, m2 += channels) {
      const int64_t n = segment * group_, images = std::min(group_, x_.images - n);
      const T* from = data_ + n * image;
      // So many channels that their lanes stay in the L1 cache.
      for (int64_t c = 0; c < channels; c += 64) {
        const int64_t width = std::min<int64_t>(64, channels - c), at = c * spatial;
        if (norm_.y == nullptr) {
          kernels_.image_sums(from + at, images, image, width, spatial, shift.data() + c, lanes.data(),
                              first.data() + c, second.data() + c);
        } else {
          kernels_.image_norm(from + at, norm_.y + n * image + at, images, image, width, spatial, shift.data() + c,
                              norm_.center + c, norm_.scale + c, norm_.bias + c, lanes.data(), first.data() + c,
                              second.data() + c);
        }
      }
      const int64_t found = kernels_.finish(channels, static_cast<double>(images * spatial), shift.data(), first.data(),
                                            second.data(), mean, m2, suspects.data());
      for (int64_t k = 0; k < found; ++k) {
        exact(from, images, suspects[k], mean, m2);
        shift[suspects[k]] = static_cast<E>(mean[suspects[k]]);
      }
      for (int64_t c = 0; c < channels; ++c) shift[c] += static_cast<E>(0.25 * (mean[c] - shift[c]));
    }
  }

  // Channel c of a group, plane by plane.
  void exact(const T* from, int64_t images, int64_t c, double* mean, double* m2) {
    const auto spatial = static_cast<double>(x_.spatial);
    for (int64_t n = 0; n < images; ++n) {
      double own_mean = 0, own_m2 = 0;
      kernels_.exact(from + (n * x_.channels + c) * x_.spatial, x_.spatial, 1, &own_mean, &own_m2);
      if (n == 0) {
        mean[c] = own_mean;
        m2[c] = own_m2;
      } else {
        kernels_.merge(1, spatial * static_cast<double>(n), mean + c, m2 + c, spatial, &own_mean, &own_m2);
      }
    }
  }

  const View& x_;
  int64_t group_;
  Table& table_;
  Norm<T> norm_;
  const T* data_;
  const Kernels<T>& kernels_ = kernels<T>();
};

}  // namespace

void normalize_rows(const View& x, const Tensor& y, const Parameters& parameters) {
  if (x.numel() == 0) return;
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    std::vector<Compute<T>> scale, zero;
    const Norm<T> norm = norm_of<T>(x, &y, &parameters, scale, zero);
    scale_rows<T>(x, x.data<T>(), norm.y, norm.center, norm.scale, norm.bias);
  });
}

int64_t images_per_group(const View& x) {
  // A lane adds at most about 128 values.
  if (x.rows || x.spatial < 16) return 1;
  return std::clamp<int64_t>(2048 / x.spatial, 1, std::max<int64_t>(1, x.images / kShards));
}

Table grouped_moments(const View& x, int64_t group, const Tensor* y, const Parameters* parameters) {
  Table table(View{x.tensor, ceil_div(x.images, group), x.channels, x.spatial, false}, 1);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    std::vector<Compute<T>> scale, zero;
    GroupedPass<T>(x, group, table, norm_of<T>(x, y, parameters, scale, zero)).run();
  });
  for (int64_t segment = 1; segment < table.segments; ++segment) {
    const int64_t n = segment * group, at = segment * x.channels;
    const auto spatial = static_cast<double>(x.spatial);
    kernels<float>().merge(x.channels, spatial * static_cast<double>(n), table.mean.get(), table.m2.get(),
                           spatial * static_cast<double>(std::min(group, x.images - n)), table.mean.get() + at,
                           table.m2.get() + at);
  }
  return table;
}

}  // namespace clusterq::bn_stats
