// Fake-quantize kernels that reduce: learned gradients, ranges of weights and activations, squared error. Sums are
// double, taken in a fixed order over fixed shards.
#include "fake_quant.h"

namespace clusterq {
namespace {

// Elements whose candidates are tried together: the activated values stay in the first-level cache.
constexpr int64_t kErrorBlock = 4096;

struct LearnedSums {
  double scale = 0, outside = 0;
};

// A sum is this many partial sums, element i in number i % kPartial, added by halving: the same bits on every
// instruction set.
constexpr int kPartial = 16;

CLUSTERQ_INLINE double total_of(double (&partial)[kPartial]) {
  for (int width = kPartial / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

template <typename T, typename A>
CLUSTERQ_INLINE void learned_one(const T* grad, const T* x, T* grad_x, const Grid<A>& grid,
                                 const Activation<A>& activation, double& sum_scale, double& sum_outside) {
  const LearnedTerm<A> term = learned_term(load<A>(*x), load<A>(*grad), grid, activation);
  *grad_x = store<T>(term.x);
  sum_scale += double(term.grad) * double(term.slope);
  sum_outside += double(term.outside);
}

template <typename T, typename A>
CLUSTERQ_INLINE void learned_run(const T* grad, const T* x, T* grad_x, int64_t n, OneGrid<A> grids,
                                 Activation<A> activation, LearnedSums* sums) {
  double scale[kPartial] = {}, outside[kPartial] = {};
  int64_t i = 0;
  for (; i + kPartial <= n; i += kPartial) {
#pragma omp simd
    for (int j = 0; j < kPartial; ++j)
      learned_one(grad + i + j, x + i + j, grad_x + i + j, grids.grid, activation, scale[j], outside[j]);
  }
  for (int j = 0; i < n; ++i, ++j)
    learned_one(grad + i, x + i, grad_x + i, grids.grid, activation, scale[j], outside[j]);
  *sums = {total_of(scale), total_of(outside)};
}

template <typename T, typename A>
CLUSTERQ_INLINE void learned_row(const T* grad, const T* x, T* grad_x, int64_t n, GridRow<A> grids,
                                 Activation<A> activation, double* sum_scale, double* sum_outside) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const LearnedTerm<A> term = learned_term(load<A>(x[i]), load<A>(grad[i]), grids.at(i), activation);
    grad_x[i] = store<T>(term.x);
    sum_scale[i] += double(term.grad) * double(term.slope);
    sum_outside[i] += double(term.outside);
  }
}

// Per-channel totals of [shards, row] accumulators.
template <typename V, typename F>
void fold_pattern(const Walk& walk, const Pattern& pattern, const std::vector<V>& partial, const F& add) {
  for (int64_t shard = 0; shard < pattern.shards; ++shard)
    for (int64_t start = 0; start < pattern.row; start += walk.channels * walk.inner)
      for (int64_t c = 0; c < walk.channels; ++c)
        for (int64_t i = 0; i < walk.inner; ++i) add(c, partial[shard * pattern.row + start + c * walk.inner + i]);
}

// Per-channel totals of one value per task of `for_runs`.
template <typename V, typename F>
void fold_runs(const Walk& walk, const std::vector<V>& partial, const F& add) {
  const int64_t blocks = walk.blocks_per_run();
  const V* next = partial.data();
  for (int64_t o = 0; o < walk.outer; ++o)
    for (int64_t c = 0; c < walk.channels; ++c)
      for (int64_t b = 0; b < blocks; ++b) add(c, *next++);
}

template <typename T, typename A>
std::vector<LearnedSums> learned(const Walk& walk, const Grids<A>& grids, Activation<A> activation, const T* grad,
                                 const T* x, T* grad_x) {
  std::vector<LearnedSums> total(walk.channels);
  if (walk.numel() == 0) return total;
  if (walk.patterned()) {
    const Pattern pattern(walk);
    const Grids<A> wide = grids.expanded(walk, pattern);
    std::vector<double> scale(pattern.shards * pattern.row), outside(pattern.shards * pattern.row);
    for_pattern(walk, pattern, [&](int64_t i, int64_t n, int64_t column, int64_t shard) {
      const int64_t at = shard * pattern.row + column;
      at_level<learned_row<T, A>>(grad + i, x + i, grad_x + i, n, wide.row(column), activation, &scale[at],
                                  &outside[at]);
    });
    fold_pattern(walk, pattern, scale, [&](int64_t c, double v) { total[c].scale += v; });
    fold_pattern(walk, pattern, outside, [&](int64_t c, double v) { total[c].outside += v; });
  } else {
    std::vector<LearnedSums> partial(walk.outer * walk.channels * walk.blocks_per_run());
    for_runs(walk, [&](int64_t i, int64_t n, int64_t channel, int64_t task) {
      at_level<learned_run<T, A>>(grad + i, x + i, grad_x + i, n, grids.one(channel), activation, &partial[task]);
    });
    fold_runs(walk, partial, [&](int64_t c, const LearnedSums& v) {
      total[c].scale += v.scale;
      total[c].outside += v.outside;
    });
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> learned_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                                    std::optional<int64_t> axis, std::string activation) {
  const Tensor x = dense(input), grad = with_strides_of(grad_output, x);
  Tensor grad_x = output_like(x);
  Tensor grad_scale = torch::stable::new_empty(scale, scale.sizes());
  Tensor grad_zero_point = torch::stable::new_empty(zero_point, zero_point.sizes());
  const Walk walk(x, axis);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto grids = Grids<A>::of(scale, zero_point, walk, quant_min, quant_max);
    const auto total =
        learned<T, A>(walk, grids, activation_of<A>(activation), static_cast<const T*>(grad.const_data_ptr()),
                      static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(grad_x.mutable_data_ptr()));
    auto* to_scale = static_cast<A*>(grad_scale.mutable_data_ptr());
    auto* to_zero_point = static_cast<A*>(grad_zero_point.mutable_data_ptr());
    for (int64_t c = 0; c < walk.channels; ++c) {
      to_scale[c] = static_cast<A>(total[c].scale);
      to_zero_point[c] = static_cast<A>(-total[c].outside * double(grids.scale[c]));
    }
  });
  return {grad_x, grad_scale, grad_zero_point};
}

// Smallest and largest finite value; low > high: none.
template <typename A>
struct Range {
  A low = std::numeric_limits<A>::infinity(), high = -std::numeric_limits<A>::infinity();
  void extend(const Range& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
};

template <typename T, typename A>
CLUSTERQ_INLINE void range_run(const T* x, int64_t n, Activation<A> activation, Range<A>* range) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  A low = inf, high = -inf;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const A v = clamp(load<A>(x[i]), activation.low, activation.high);
    const bool finite = (v > -inf) & (v < inf);
    const A for_low = finite ? v : inf, for_high = finite ? v : -inf;
    low = for_low < low ? for_low : low;
    high = for_high > high ? for_high : high;
  }
  // Which zero of several is kept depends on the order of the lanes: +0 it is.
  *range = {low + A(0), high + A(0)};
}

template <typename T, typename A>
CLUSTERQ_INLINE void range_row(const T* x, int64_t n, Activation<A> activation, A* low, A* high) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const A v = clamp(load<A>(x[i]), activation.low, activation.high);
    const bool finite = (v > -inf) & (v < inf);
    const A for_low = finite ? v : inf, for_high = finite ? v : -inf;
    low[i] = for_low < low[i] ? for_low : low[i];
    high[i] = for_high > high[i] ? for_high : high[i];
  }
}

template <typename T, typename A>
CLUSTERQ_INLINE void quantize_channel(const T* x, T* y, int64_t n, Steps<A> steps) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(fake_quantize(load<A>(x[i]), steps));
}

template <typename T, typename A>
std::vector<Range<A>> channel_ranges(const Walk& walk, Activation<A> activation, const T* x) {
  std::vector<Range<A>> total(walk.channels);
  if (walk.numel() == 0) return total;
  if (walk.patterned()) {
    const Pattern pattern(walk);
    std::vector<A> low(pattern.shards * pattern.row, std::numeric_limits<A>::infinity());
    std::vector<A> high(low.size(), -std::numeric_limits<A>::infinity());
    for_pattern(walk, pattern, [&](int64_t i, int64_t n, int64_t column, int64_t shard) {
      const int64_t at = shard * pattern.row + column;
      at_level<range_row<T, A>>(x + i, n, activation, &low[at], &high[at]);
    });
    fold_pattern(walk, pattern, low, [&](int64_t c, A v) { total[c].low = std::min(total[c].low, v); });
    fold_pattern(walk, pattern, high, [&](int64_t c, A v) { total[c].high = std::max(total[c].high, v); });
  } else {
    std::vector<Range<A>> partial(walk.outer * walk.channels * walk.blocks_per_run());
    for_runs(walk, [&](int64_t i, int64_t n, int64_t, int64_t task) {
      at_level<range_run<T, A>>(x + i, n, activation, &partial[task]);
    });
    fold_runs(walk, partial, [&](int64_t c, const Range<A>& v) { total[c].extend(v); });
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> weight(const Tensor& input, int64_t quant_min, int64_t quant_max, int64_t axis,
                                          bool symmetric) {
  const Tensor w = dense(input);
  const Walk walk(w, axis);
  const std::array<int64_t, 1> shape{walk.channels};
  Tensor scale = torch::stable::new_empty(w, shape, compute_dtype(w.scalar_type()));
  Tensor zero_point = torch::stable::new_empty(w, shape, compute_dtype(w.scalar_type()));
  // A channel in one piece is quantized while its range search has it in the cache; a very large one is shared by
  // threads.
  const bool fused = walk.outer <= 1 && walk.inner <= (int64_t(1) << 18);
  Tensor y = fused ? output_like(w) : w;
  for_floating(w.scalar_type(), "w", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto* from = static_cast<const T*>(w.const_data_ptr());
    auto* to_scale = static_cast<A*>(scale.mutable_data_ptr());
    auto* to_zero_point = static_cast<A*>(zero_point.mutable_data_ptr());
    const auto none = activation_of<A>("none");
    const auto grid_of = [&](int64_t c, const Range<A>& range) {
      const Grid<A> grid = range_to_grid(range.low, range.high, quant_min, quant_max, symmetric);
      to_scale[c] = grid.scale;
      to_zero_point[c] = grid.zero_point;
      return grid;
    };
    if (!fused) {
      const auto ranges = channel_ranges<T, A>(walk, none, from);
      for (int64_t c = 0; c < walk.channels; ++c) grid_of(c, ranges[c]);
      return;
    }
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    const int64_t n = walk.outer * walk.inner;
    parallel_for(0, walk.channels, ceil_div(Walk::kBlock, std::max<int64_t>(n, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Range<A> range;
        at_level<range_run<T, A>>(from + c * n, n, none, &range);
        at_level<quantize_channel<T, A>>(from + c * n, to + c * n, n, to_steps(grid_of(c, range), none));
      }
    });
  });
  if (!fused) y = fake_quantize_forward(w, scale, zero_point, quant_min, quant_max, axis, "none");
  return {y, scale, zero_point};
}

std::tuple<Tensor, Tensor, Tensor> observe(const Tensor& input, Tensor running_min, Tensor running_max,
                                           int64_t quant_min, int64_t quant_max, double momentum, bool watch,
                                           bool symmetric, std::optional<int64_t> axis, std::string activation) {
  const Tensor x = dense(input);
  const Walk walk(x, axis);
  const ScalarType dtype = compute_dtype(x.scalar_type());
  check_dtype(running_min, dtype, "running_min");
  check_dtype(running_max, dtype, "running_max");
  check_numel(running_min, walk.channels, "running_min");
  check_numel(running_max, walk.channels, "running_max");
  Tensor scale = torch::stable::new_empty(running_min, running_min.sizes());
  Tensor zero_point = torch::stable::new_empty(running_min, running_min.sizes());
  Tensor minimum = packed(running_min), maximum = packed(running_max);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    auto* low = static_cast<A*>(minimum.mutable_data_ptr());
    auto* high = static_cast<A*>(maximum.mutable_data_ptr());
    if (watch) {
      const auto ranges =
          channel_ranges<T, A>(walk, activation_of<A>(activation), static_cast<const T*>(x.const_data_ptr()));
      for (int64_t c = 0; c < walk.channels; ++c) {
        const bool first = low[c] > high[c], seen = ranges[c].low <= ranges[c].high;
        low[c] = moved_bound(low[c], ranges[c].low, momentum, first, seen);
        high[c] = moved_bound(high[c], ranges[c].high, momentum, first, seen);
      }
    }
    auto* to_scale = static_cast<A*>(scale.mutable_data_ptr());
    auto* to_zero_point = static_cast<A*>(zero_point.mutable_data_ptr());
    for (int64_t c = 0; c < walk.channels; ++c) {
      const Grid<A> grid = range_to_grid(low[c], high[c], quant_min, quant_max, symmetric);
      to_scale[c] = grid.scale;
      to_zero_point[c] = grid.zero_point;
    }
  });
  if (watch && !running_min.is_contiguous()) torch::stable::copy_(running_min, minimum);
  if (watch && !running_max.is_contiguous()) torch::stable::copy_(running_max, maximum);
  return {fake_quantize_forward(x, scale, zero_point, quant_min, quant_max, axis, activation), scale, zero_point};
}

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
  STD_TORCH_CHECK(scales.dim() == 2 && zero_points.dim() == 2, "scales and zero_points must be [candidates, channels]");
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

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&clusterq::learned_backward));
  m.impl("fake_quantize_weight", TORCH_BOX(&clusterq::weight));
  m.impl("observe_fake_quantize", TORCH_BOX(&clusterq::observe));
  m.impl("quantization_error", TORCH_BOX(&clusterq::error));
}
