// Statistics of x with its channels innermost on CUDA, alone or with eval-mode BatchNorm. Bytes per element of float32:
// 4, with BatchNorm 8.
#include "bn_stats_rows.h"

namespace clusterq {
namespace {

template <int V, bool kNorm, typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads)
    row_kernel(const __grid_constant__ Task<T, A> task, const Norm<A> norm) {
  rows<kNorm, V, kHeldRows>(task, norm, blockIdx.x);
}

}  // namespace

void launch_row_statistics(Element element, const void* x, const Samples& samples, const StatisticsPlan& plan,
                           const Normalization* norm, const StatisticsTarget& target, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const auto task = task_of<T, A>(x, norm == nullptr ? nullptr : norm->y, samples, plan, target);
    const auto run = [&](auto with_norm) {
      constexpr bool kNorm = decltype(with_norm)::value;
      const Norm<A> parameters = kNorm ? norm_of<A>(*norm) : Norm<A>{};
      const auto kernel = plan.width == 1 ? row_kernel<1, kNorm, T, A> : row_kernel<kWide<T>, kNorm, T, A>;
      launch(kernel, plan.blocks, kStatisticsThreads, stream, task, parameters);
    };
    norm == nullptr ? run(std::false_type{}) : run(std::true_type{});
  });
}

}  // namespace clusterq
