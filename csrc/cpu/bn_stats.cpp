// Forward kernels of clusterq/ops/bn_stats.py. One pass over x fills a table of (mean, centered squares) per image and
// channel in double; instance, batch and class statistics are ordered merges of its rows.
#include "cpu/bn_stats.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace clusterq::bn_stats {
namespace {

// Segments of x whose moments are rows of the table: whole images, or for channels-innermost tensors equal parts of
// them.
struct Table {
  int64_t segments, channels;
  int64_t parts;   // per image
  int64_t length;  // positions per part, the last may be shorter
  std::unique_ptr<double[]> mean, m2;

  Table(const View& x, int64_t parts_per_image)
      : segments(x.images * parts_per_image),
        channels(x.channels),
        parts(parts_per_image),
        length(ceil_div(x.spatial, parts_per_image)),
        mean(new double[segments * channels]),
        m2(new double[segments * channels]) {}

  int64_t begin(int64_t segment) const { return segment % parts * length; }
  int64_t count(int64_t segment, int64_t spatial) const {
    return std::max<int64_t>(0, std::min(length, spatial - begin(segment)));
  }
};

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
      kernels_.to_double(data_ + at, count * x_.channels, table_.mean.get() + at, table_.m2.get() + at);
      if (norm_.y != nullptr) {
        kernels_.row_affine(data_ + at, nullptr, norm_.y + at, count, x_.channels, fold_, norm_.center, norm_.scale,
                            norm_.bias, nullptr);
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

// Fills the table of x, and y where asked.
Table moments(const View& x, int64_t parts, const Tensor* y, const Tensor* center, const Tensor* scale,
              const Tensor* bias) {
  Table table(x, parts);
  if (x.spatial == 0) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(table.mean.get(), table.segments * table.channels, nan);
    std::fill_n(table.m2.get(), table.segments * table.channels, nan);
  } else if (x.numel() > 0) {
    dispatch(x, [&](auto element) {
      using T = decltype(element);
      Norm<T> norm;
      if (y != nullptr) {
        norm.y = static_cast<T*>(y->mutable_data_ptr());
        norm.center = static_cast<const Compute<T>*>(center->const_data_ptr());
        norm.scale = static_cast<const Compute<T>*>(scale->const_data_ptr());
        norm.bias = static_cast<const Compute<T>*>(bias->const_data_ptr());
      }
      Pass<T>(x, table, norm).run();
    });
  }
  return table;
}

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

std::tuple<Tensor, Tensor> instance_outputs(const View& x, Table& table) {
  merge_parts(x, table);
  Tensor mean = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  Tensor var = torch::stable::new_empty(x.tensor, {x.images, x.channels}, statistics_dtype(x));
  const int64_t row = table.parts * x.channels, shards = std::min(x.images, kShards);
  if (x.images * x.channels == 0) return {mean, var};
  const int64_t per_shard = ceil_div(x.images, shards);
  torch::stable::parallel_for(0, shards, grain(x, shards), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * per_shard; n < std::min(end * per_shard, x.images); ++n) {
      write(mean, n * x.channels, table.mean.get() + n * row, x.channels, 1);
      write(var, n * x.channels, table.m2.get() + n * row, x.channels, static_cast<double>(x.spatial));
    }
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> instance_statistics(const Tensor& tensor) {
  const View x = view(tensor);
  Table table = moments(x, instance_parts(x), nullptr, nullptr, nullptr, nullptr);
  return instance_outputs(x, table);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_instance_statistics(const Tensor& tensor, const Tensor& center,
                                                                  const Tensor& scale, const Tensor& shift) {
  const View x = view(tensor);
  const Tensor y = empty_like(x);
  const Tensor m = per_channel(x, center, "center"), s = per_channel(x, scale, "scale"),
               b = per_channel(x, shift, "shift");
  Table table = moments(x, instance_parts(x), &y, &m, &s, &b);
  auto [mean, var] = instance_outputs(x, table);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_moments(View x, int64_t correction, const Tensor* y, const Tensor* center,
                                         const Tensor* scale, const Tensor* shift) {
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
  if (values > 0 && channels > 0) {
    Table table = moments(x, parts, y, center, scale, shift);
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

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& tensor, int64_t correction) {
  return batch_moments(view(tensor), correction, nullptr, nullptr, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_batch_statistics(const Tensor& tensor, const Tensor& center,
                                                               const Tensor& scale, const Tensor& shift) {
  const View x = view(tensor);
  const Tensor y = empty_like(x);
  const Tensor m = per_channel(x, center, "center"), s = per_channel(x, scale, "scale"),
               b = per_channel(x, shift, "shift");
  auto [mean, var] = batch_moments(x, 0, &y, &m, &s, &b);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> class_statistics(const Tensor& tensor, const Tensor& labels, int64_t num_classes,
                                                    const std::optional<Tensor>& mask) {
  const View x = view(tensor);
  check_dtype(labels, ScalarType::Long, "labels");
  check_sizes(labels, {x.images}, "labels");
  const Tensor index = packed(labels);
  const auto* label = static_cast<const int64_t*>(index.const_data_ptr());
  std::optional<Tensor> kept;
  if (mask.has_value()) {
    check_dtype(*mask, ScalarType::Bool, "mask");
    check_sizes(*mask, {x.images}, "mask");
    kept = packed(*mask);
  }
  const bool* keep = kept.has_value() ? static_cast<const bool*>(kept->const_data_ptr()) : nullptr;

  Table table = moments(x, instance_parts(x), nullptr, nullptr, nullptr, nullptr);
  merge_parts(x, table);
  // Images of each class in their order, after the first `starts[k]` entries of the list.
  std::vector<int64_t> starts(num_classes + 1, 0), members;
  const auto inside = [&](int64_t n) {
    return label[n] >= 0 && label[n] < num_classes && (keep == nullptr || keep[n]);
  };
  for (int64_t n = 0; n < x.images; ++n) {
    if (inside(n)) ++starts[label[n] + 1];
  }
  for (int64_t k = 0; k < num_classes; ++k) starts[k + 1] += starts[k];
  members.resize(starts[num_classes]);
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < x.images; ++n) {
    if (inside(n)) members[next[label[n]]++] = n;
  }

  const Tensor count = torch::stable::new_empty(x.tensor, {num_classes}, ScalarType::Long);
  const Tensor mean = torch::stable::new_empty(x.tensor, {num_classes, x.channels}, statistics_dtype(x));
  const Tensor var = torch::stable::new_empty(x.tensor, {num_classes, x.channels}, statistics_dtype(x));
  const int64_t row = table.parts * x.channels;
  auto* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  const auto spatial = static_cast<double>(x.spatial);
  torch::stable::parallel_for(0, num_classes, grain(x, num_classes), [&](int64_t begin, int64_t end) {
    std::vector<double> m(x.channels), q(x.channels);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t images = starts[k + 1] - starts[k];
      counts[k] = images;
      std::fill(m.begin(), m.end(), 0.0);
      std::fill(q.begin(), q.end(), 0.0);
      for (int64_t i = 0; i < images; ++i) {
        const int64_t from = members[starts[k] + i] * row;
        merge(spatial * static_cast<double>(i), m.data(), q.data(), spatial, table.mean.get() + from,
              table.m2.get() + from, x.channels);
      }
      write(mean, k * x.channels, m.data(), x.channels, 1);
      write(var, k * x.channels, q.data(), x.channels, images > 0 ? spatial * static_cast<double>(images) : 1);
    }
  });
  return {count, mean, var};
}

}  // namespace
}  // namespace clusterq::bn_stats

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  using namespace clusterq::bn_stats;
  m.impl("instance_statistics", TORCH_BOX(&instance_statistics));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("class_statistics", TORCH_BOX(&class_statistics));
  m.impl("batch_norm_batch_statistics", TORCH_BOX(&batch_norm_batch_statistics));
  m.impl("batch_norm_instance_statistics", TORCH_BOX(&batch_norm_instance_statistics));
}
