// Learned (LSQ) backward of fake-quantize: gradients for x, scale and zero point in one read of x and grad.
#include <functional>

#include "fake_quant_learned_avx512.h"
#include "fake_quant_sums.h"

namespace clusterq {
namespace {

struct LearnedSums {
  double scale = 0, outside = 0;
};

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

// The two loops, at the CPU's level.
template <typename T, typename A>
void learned_run_at_level(const T* grad, const T* x, T* grad_x, int64_t n, OneGrid<A> grids, Activation<A> activation,
                          LearnedSums* sums) {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<A, float>) {
    if (cpu_level() == CpuLevel::kAvx512) {
      double scale[kPartial], outside[kPartial];
      const auto run = std::isfinite(activation.low) ? learned_run_lanes<true, T> : learned_run_lanes<false, T>;
      run(grad, x, grad_x, n, grids, activation, scale, outside);
      *sums = {total_of(scale), total_of(outside)};
      return;
    }
  }
#endif
  at_level<learned_run<T, A>>(grad, x, grad_x, n, grids, activation, sums);
}

template <typename T, typename A>
void learned_rows_at_level(const T* grad, const T* x, T* grad_x, int64_t n, int64_t rows, int64_t stride,
                           GridRow<A> grids, Activation<A> activation, double* scale, double* outside) {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<A, float>) {
    if (cpu_level() == CpuLevel::kAvx512) {
      const auto body = std::isfinite(activation.low) ? learned_rows_lanes<true, T> : learned_rows_lanes<false, T>;
      return body(grad, x, grad_x, n, rows, stride, grids, activation, scale, outside);
    }
  }
#endif
  for (int64_t at = 0; at < rows * stride; at += stride)
    at_level<learned_row<T, A>>(grad + at, x + at, grad_x + at, n, grids, activation, scale, outside);
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
    for_pattern(walk, pattern, [&](int64_t i, int64_t n, int64_t column, int64_t shard, int64_t rows) {
      const int64_t at = shard * pattern.row + column;
      learned_rows_at_level<T, A>(grad + i, x + i, grad_x + i, n, rows, pattern.row, wide.row(column), activation,
                                  &scale[at], &outside[at]);
    });
    fold_pattern(walk, pattern, scale, std::plus<double>(), [&](int64_t c, double v) { total[c].scale += v; });
    fold_pattern(walk, pattern, outside, std::plus<double>(), [&](int64_t c, double v) { total[c].outside += v; });
  } else {
    std::vector<LearnedSums> partial(walk.outer * walk.channels * walk.blocks_per_run());
    for_runs(walk, [&](int64_t i, int64_t n, int64_t channel, int64_t task) {
      learned_run_at_level<T, A>(grad + i, x + i, grad_x + i, n, grids.one(channel), activation, &partial[task]);
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

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&clusterq::learned_backward));
}
