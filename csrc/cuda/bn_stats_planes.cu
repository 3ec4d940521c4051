// Statistics of contiguous x on CUDA, alone or with eval-mode BatchNorm. Bytes per element of float32: 4, with
// BatchNorm 8.
#include "bn_stats_planes.h"

namespace clusterq {
namespace {

template <Walk kWalk, bool kNorm, typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads)
    plane_kernel(const __grid_constant__ Task<T, A> task, const Norm<A> norm) {
  if constexpr (kWalk == Walk::kPacks) packed_planes<kNorm>(task, norm, blockIdx.x);
  if constexpr (kWalk == Walk::kSlab) slab_planes<kNorm>(task, norm, blockIdx.x);
  if constexpr (kWalk == Walk::kBlock) large_plane<kNorm>(task, norm, blockIdx.x);
}

}  // namespace

void launch_plane_statistics(Element element, const void* x, const Samples& samples, const StatisticsPlan& plan,
                             const Normalization* norm, const StatisticsTarget& target, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const auto task = task_of<T, A>(x, norm == nullptr ? nullptr : norm->y, samples, plan, target);
    const auto run = [&](auto with_norm) {
      constexpr bool kNorm = decltype(with_norm)::value;
      const Norm<A> parameters = kNorm ? norm_of<A>(*norm) : Norm<A>{};
      const auto start = [&](auto kernel) {
        launch(kernel, plan.blocks, kStatisticsThreads, stream, task, parameters);
      };
      if (plan.walk == Walk::kPacks) return start(plane_kernel<Walk::kPacks, kNorm, T, A>);
      if (plan.walk == Walk::kSlab) return start(plane_kernel<Walk::kSlab, kNorm, T, A>);
      start(plane_kernel<Walk::kBlock, kNorm, T, A>);
    };
    norm == nullptr ? run(std::false_type{}) : run(std::true_type{});
  });
}

}  // namespace clusterq
