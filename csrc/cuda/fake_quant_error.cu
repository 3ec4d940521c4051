// Squared error of candidate grids on CUDA: a block takes elements of one channel into registers and tries up to
// kCandidates grids on them, so x is read once per so many; a second launch adds the blocks. Sums are double, in a
// fixed order: element, thread, warp, block.
#include <algorithm>

#include "fake_quant.h"

namespace clusterq {
namespace {

constexpr int kCandidates = 128;
// Elements that a thread holds.
constexpr int kValues = 16;
constexpr int kWarps = kThreads / 32;
// Blocks are wanted of which there are this many; the order of the sums hangs on it.
constexpr int64_t kBlocks = 1024;

template <int V, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    error_kernel(double* __restrict__ partial, const T* __restrict__ x, const A* __restrict__ scales,
                 const A* __restrict__ zero_points, A quant_min, A quant_max, ChannelWalk walk, int64_t packs,
                 int64_t elements, int64_t candidates, int64_t splits) {
  constexpr int kPacks = kValues / V;
  constexpr A inf = std::numeric_limits<A>::infinity();
  __shared__ Steps<A> steps[kCandidates];
  __shared__ double sums[kWarps][kCandidates];
  // All of them less than the blocks there are.
  const unsigned rest = blockIdx.x / static_cast<unsigned>(splits), count_of = static_cast<unsigned>(walk.channels);
  const int64_t split = blockIdx.x - rest * static_cast<unsigned>(splits);
  const int64_t channel = rest % count_of, first = static_cast<int64_t>(rest / count_of) * kCandidates;
  const int count = static_cast<int>(candidates - first < kCandidates ? candidates - first : kCandidates);
  for (int m = threadIdx.x; m < count; m += kThreads) {
    const int64_t at = (first + m) * walk.channels + channel;
    const Grid<A> grid{scales[at], reciprocal(scales[at]), zero_points[at], quant_min, quant_max};
    steps[m] = to_steps(grid, Activation<A>{-inf, inf});
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int m = lane; m < count; m += 32) sums[warp][m] = 0;
  __syncthreads();
  for (int64_t tile = split; tile * (kThreads * kPacks) < packs; tile += splits) {
    // What is not there or not finite is NaN, and left out.
    A values[kValues];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t i = (tile * kPacks + k) * kThreads + threadIdx.x;
      const int64_t left = i < packs ? (walk.single ? elements - i * V : V) : 0;
      Pack<T, V> pack;
      if (left > 0) pack = load_some<V>(x + walk.at(channel, i, V), left);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A value = v < left ? A(widen(pack.at[v])) : inf;
        values[k * V + v] = (value > -inf) & (value < inf) ? value : std::numeric_limits<A>::quiet_NaN();
      }
    }
    for (int m = 0; m < count; ++m) {
      const Steps<A> step = steps[m];
      double sum = 0;
#pragma unroll
      for (int e = 0; e < kValues; ++e) {
        const A difference = fake_quantize(values[e], step) - values[e];
        const double wide = difference == difference ? difference : A(0);
        sum = __fma_rn(wide, wide, sum);
      }
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kFullWarp, sum, offset);
      if (lane == 0) sums[warp][m] += sum;
    }
  }
  __syncthreads();
  for (int m = threadIdx.x; m < count; m += kThreads) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][m];
    partial[(split * candidates + first + m) * walk.channels + channel] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    error_finish_kernel(double* __restrict__ result, const double* __restrict__ partial, int64_t count,
                        int64_t splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  double total = 0;
  for (int64_t split = 0; split < splits; ++split) total += partial[split * count + i];
  result[i] = total;
}

}  // namespace

int64_t error_splits(const Extent& extent, int64_t candidates) {
  const int64_t others = extent.channels * blocks_of(candidates, kCandidates);
  const int64_t elements = extent.numel / extent.channels;
  return std::clamp<int64_t>(blocks_of(elements, kThreads * kValues), 1, std::max<int64_t>(1, kBlocks / others));
}

void launch_error(Element element, const void* x, const Extent& extent, const void* scales, const void* zero_points,
                  int64_t candidates, const CodeRange& codes, double* partial, double* result, cudaStream_t stream) {
  const int64_t splits = error_splits(extent, candidates), elements = extent.numel / extent.channels;
  const int64_t blocks = splits * extent.channels * blocks_of(candidates, kCandidates);
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      const ChannelWalk walk(extent, V);
      const int64_t packs = extent.numel / (extent.channels * extent.inner) * walk.per_run.divisor;
      launch(error_kernel<V, T, A>, blocks, kThreads, stream, partial, static_cast<const T*>(x),
             static_cast<const A*>(scales), static_cast<const A*>(zero_points), static_cast<A>(codes.quant_min),
             static_cast<A>(codes.quant_max), walk, packs, elements, candidates, splits);
    };
    // Only the single run of a tensor with one channel may end within a pack.
    if (aligned(x) && (extent.channels == 1 || extent.inner % kWide<T> == 0))
      return run(std::integral_constant<int, kWide<T>>{});
    run(std::integral_constant<int, 1>{});
  });
  const int64_t count = candidates * extent.channels;
  launch(error_finish_kernel, blocks_of(count, kThreads), kThreads, stream, result, static_cast<const double*>(partial),
         count, splits);
}

}  // namespace clusterq
