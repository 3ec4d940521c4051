// Ranges of finite values, per tensor or channel; NaN and infinities are left out.
#pragma once

#include "fake_quant_avx512.h"
#include "fake_quant_sums.h"

namespace clusterq {
namespace {

// Smallest and largest finite value; low > high: none.
template <typename A>
struct Range {
  A low = std::numeric_limits<A>::infinity(), high = -std::numeric_limits<A>::infinity();
  void extend(const Range& other) {
    // Which zero of several is kept would depend on the order: adding 0 turns -0 into +0.
    low = std::min(low, other.low) + A(0);
    high = std::max(high, other.high) + A(0);
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
  *range = {low, high};
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

// The two loops, at the level of the CPU.
template <typename T, typename A>
Range<A> range_of(const T* x, int64_t n, const Activation<A>& activation) {
  Range<A> range;
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<A, float>) {
    if (cpu_level() == CpuLevel::kAvx512) {
      range_lanes(x, n, activation, &range.low, &range.high);
      return range;
    }
  }
#endif
  at_level<range_run<T, A>>(x, n, activation, &range);
  return range;
}

template <typename T, typename A>
void extend_rows(const T* x, int64_t n, int64_t rows, int64_t stride, const Activation<A>& activation, A* low,
                 A* high) {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<A, float>)
    if (cpu_level() == CpuLevel::kAvx512) return range_rows_lanes(x, n, rows, stride, activation, low, high);
#endif
  for (int64_t at = 0; at < rows * stride; at += stride) at_level<range_row<T, A>>(x + at, n, activation, low, high);
}

template <typename T, typename A>
std::vector<Range<A>> channel_ranges(const Walk& walk, Activation<A> activation, const T* x) {
  std::vector<Range<A>> total(walk.channels);
  if (walk.numel() == 0) return total;
  if (walk.patterned()) {
    const Pattern pattern(walk);
    std::vector<A> low(pattern.shards * pattern.row, std::numeric_limits<A>::infinity());
    std::vector<A> high(low.size(), -std::numeric_limits<A>::infinity());
    for_pattern(walk, pattern, [&](int64_t i, int64_t n, int64_t column, int64_t shard, int64_t rows) {
      const int64_t at = shard * pattern.row + column;
      extend_rows<T, A>(x + i, n, rows, pattern.row, activation, &low[at], &high[at]);
    });
    const auto least = [](A a, A b) { return b < a ? b : a; };
    const auto most = [](A a, A b) { return b > a ? b : a; };
    fold_pattern(walk, pattern, low, least, [&](int64_t c, A v) { total[c].extend({v, total[c].high}); });
    fold_pattern(walk, pattern, high, most, [&](int64_t c, A v) { total[c].extend({total[c].low, v}); });
  } else {
    std::vector<Range<A>> partial(walk.outer * walk.channels * walk.blocks_per_run());
    for_runs(walk, [&](int64_t i, int64_t n, int64_t, int64_t task) {
      partial[task] = range_of<T, A>(x + i, n, activation);
    });
    fold_runs(walk, partial, [&](int64_t c, const Range<A>& v) { total[c].extend(v); });
  }
  return total;
}

// Scale and zero point of the running range [low, high], written to where the outputs of an op are.
template <typename A>
void write_grids(const A* low, const A* high, int64_t channels, int64_t quant_min, int64_t quant_max, bool symmetric,
                 A* scale, A* zero_point) {
  for (int64_t c = 0; c < channels; ++c) {
    const Grid<A> grid = range_to_grid(low[c], high[c], quant_min, quant_max, symmetric);
    scale[c] = grid.scale;
    zero_point[c] = grid.zero_point;
  }
}

// Moves the running range toward `ranges`.
template <typename A>
void move_ranges(const std::vector<Range<A>>& ranges, double momentum, A* low, A* high) {
  for (size_t c = 0; c < ranges.size(); ++c) {
    const bool first = low[c] > high[c], seen = ranges[c].low <= ranges[c].high;
    low[c] = moved_bound(low[c], ranges[c].low, momentum, first, seen);
    high[c] = moved_bound(high[c], ranges[c].high, momentum, first, seen);
  }
}

// A running range, checked, packed while it is worked on and written back where it was strided; and the grid of it.
struct RunningRange {
  Tensor running_min, running_max, low, high, scale, zero_point;

  RunningRange(const Tensor& minimum, const Tensor& maximum, const Walk& walk, ScalarType dtype)
      : running_min(minimum), running_max(maximum) {
    check_dtype(minimum, dtype, "running_min");
    check_dtype(maximum, dtype, "running_max");
    check_numel(minimum, walk.channels, "running_min");
    check_numel(maximum, walk.channels, "running_max");
    low = packed(minimum);
    high = packed(maximum);
    scale = torch::stable::new_empty(minimum, minimum.sizes());
    zero_point = torch::stable::new_empty(minimum, minimum.sizes());
  }

  template <typename A>
  void move(const std::vector<Range<A>>& ranges, double momentum) {
    move_ranges(ranges, momentum, static_cast<A*>(low.mutable_data_ptr()), static_cast<A*>(high.mutable_data_ptr()));
    if (!running_min.is_contiguous()) torch::stable::copy_(running_min, low);
    if (!running_max.is_contiguous()) torch::stable::copy_(running_max, high);
  }

  template <typename A>
  void make_grids(int64_t channels, int64_t quant_min, int64_t quant_max, bool symmetric) {
    write_grids(static_cast<const A*>(low.const_data_ptr()), static_cast<const A*>(high.const_data_ptr()), channels,
                quant_min, quant_max, symmetric, static_cast<A*>(scale.mutable_data_ptr()),
                static_cast<A*>(zero_point.mutable_data_ptr()));
  }
};

}  // namespace
}  // namespace clusterq
