// What the op functions on BatchNorm statistics share: x as the kernels see it, BatchNorm parameters, lists of x.
#pragma once

#include <limits>

#include "bn_stats.h"
#include "host.h"

namespace clusterq {
namespace {

using Optional = std::optional<Tensor>;

inline int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  return positions;
}

// Whether the memory of x is [N, spatial, C], contiguous.
inline bool channels_innermost(const Tensor& x) {
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

inline void fill_nan(const Tensor& tensor) {
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

inline bool all_aligned(const Input& input, const Normalization* norm) {
  const auto place = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16; };
  return place(input.x.const_data_ptr()) == 0 && (norm == nullptr || place(norm->y) == 0);
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

}  // namespace
}  // namespace clusterq
