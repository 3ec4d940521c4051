// Squared error of many candidate grids at once.
#include "fake_quant_sums.h"

namespace clusterq {
namespace {

// Elements whose candidates are tried together: the activated values stay in the first-level cache.
constexpr int64_t kErrorBlock = 4096;

template <typename A>
CLUSTERQ_INLINE void squared_error_one(A x, const Steps<A>& steps, double& sum) {
  const double difference = double(fake_quantize(x, steps) - x);
  sum += difference * difference;
}

template <typename A>
CLUSTERQ_INLINE double squared_error(const A* x, int64_t n, Steps<A> steps) {
  double sums[kPartial] = {};
  int64_t i = 0;
  for (; i + kPartial <= n; i += kPartial)
    for (int j = 0; j < kPartial; ++j) squared_error_one(x[i + j], steps, sums[j]);
  for (int j = 0; i < n; ++i, ++j) squared_error_one(x[i], steps, sums[j]);
  return total_of(sums);
}

// Copies elements [start, start + n) of one channel; what is not finite becomes 0, which quantizes without error.
template <typename T, typename A>
void gather_channel(const Walk& walk, const T* x, int64_t channel, int64_t start, int64_t n, A* out) {
  int64_t o = start / walk.inner, i = start % walk.inner;
  while (n > 0) {
    const int64_t length = std::min(n, walk.inner - i);
    const T* from = x + (o * walk.channels + channel) * walk.inner + i;
    for (int64_t k = 0; k < length; ++k) {
      const A v = load<A>(from[k]);
      *out++ = v - v == A(0) ? v : A(0);
    }
    n -= length;
    i = 0;
    ++o;
  }
}

Tensor error(const Tensor& input, const Tensor& scales, const Tensor& zero_points, int64_t quant_min, int64_t quant_max,
             std::optional<int64_t> axis) {
  const Tensor x = dense(input);
  const Walk walk(x, axis);
  CLUSTERQ_CHECK(scales.dim() == 2 && zero_points.dim() == 2, "scales and zero_points must be [candidates, channels]");
  const int64_t candidates = scales.size(0);
  check_numel(scales, candidates * walk.channels, "scales");
  check_numel(zero_points, candidates * walk.channels, "zero_points");
  check_dtype(scales, compute_dtype(x.scalar_type()), "scales");
  check_dtype(zero_points, compute_dtype(x.scalar_type()), "zero_points");
  const Tensor s = packed(scales), z = packed(zero_points);
  Tensor result = torch::stable::new_zeros(scales, scales.sizes(), ScalarType::Double);
  if (walk.numel() == 0) return result;
  const int64_t length = walk.outer * walk.inner, blocks = ceil_div(length, kErrorBlock);
  std::vector<double> partial(walk.channels * blocks * candidates);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* scale = static_cast<const A*>(s.const_data_ptr());
    const auto* zero_point = static_cast<const A*>(z.const_data_ptr());
    const int64_t per_task = std::max<int64_t>(1, std::min(length, kErrorBlock) * candidates);
    parallel_for(0, walk.channels * blocks, ceil_div(2 * Walk::kBlock, per_task), [&](int64_t begin, int64_t end) {
      std::vector<A> values(std::min(length, kErrorBlock));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task / blocks, start = task % blocks * kErrorBlock, n = std::min(kErrorBlock, length - start);
        gather_channel<T, A>(walk, from, c, start, n, values.data());
        for (int64_t m = 0; m < candidates; ++m) {
          const A step = scale[m * walk.channels + c];
          const Grid<A> grid{step, A(1) / step, zero_point[m * walk.channels + c], static_cast<A>(quant_min),
                             static_cast<A>(quant_max)};
          partial[task * candidates + m] =
              at_level<squared_error<A>>(values.data(), n, to_steps(grid, activation_of<A>("none")));
        }
      }
    });
  });
  auto* to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t task = 0; task < walk.channels * blocks; ++task)
    for (int64_t m = 0; m < candidates; ++m) to[m * walk.channels + task / blocks] += partial[task * candidates + m];
  return result;
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) { m.impl("quantization_error", TORCH_BOX(&clusterq::error)); }
