// Learned (LSQ) backward of fake-quantize on CUDA: gradients for x, scale and zero point in one read of x and grad, 12
// bytes per element of float32. Sums run in a fixed order: registers, block, then a second kernel over the blocks.
#include "fake_quant.h"

namespace clusterq {
namespace {

// Packs that a thread handles one after the other.
constexpr int kPacks = 8;
// Runs of a channel shorter than this are reduced column by column.
constexpr int64_t kShortRun = 32;

// Gradient of one element, and what it adds to the sums: dscale = sum(first), dzero_point = -scale * sum(second).
template <typename A>
__device__ __forceinline__ A learned(A x, A grad, const Grid<A>& grid, const Activation<A>& activation, A& first,
                                     A& second) {
  const LearnedTerm<A> term = learned_term(x, grad, grid, activation);
  first += term.grad * term.slope;
  second += term.outside;
  return term.x;
}

// Runs of one channel: block (split, channel) takes kPacks * kThreads packs of the channel's outer * inner elements.
// Sums: a pack in the arithmetic type, the rest in double. partial: [2, splits, channels].
template <int V, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    learned_run_kernel(T* __restrict__ grad_x, double* __restrict__ partial, const T* __restrict__ x,
                       const T* __restrict__ grad, Parameters<A> parameters, Activation<A> activation, ChannelWalk walk,
                       int64_t packs, int64_t splits) {
  using P = Pack<T, V>;
  const int64_t inner = walk.inner, channels = walk.channels;
  const unsigned count = static_cast<unsigned>(channels);
  const int64_t channel = blockIdx.x % count, split = blockIdx.x / count;
  const Grid<A> grid = parameters.grid(channel);
  double sum_scale = 0, sum_zero = 0;
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = (split * kPacks + k) * kThreads + threadIdx.x;
    if (i >= packs) break;
    const int64_t at = walk.at(channel, i, V);
    // Only the single run of a tensor with one scale may end within a pack.
    const int64_t left = walk.single ? inner - i * V : V;
    A first = 0, second = 0;
    if (left >= V) {
      const P values = load_pack<V>(x + at), grads = load_pack<V>(grad + at);
      P result;
#pragma unroll
      for (int v = 0; v < V; ++v)
        result.at[v] =
            Narrow<T>::of(learned(A(widen(values.at[v])), A(widen(grads.at[v])), grid, activation, first, second));
      store_pack(grad_x + at, result);
    } else {
      for (int64_t j = at; j < at + left; ++j)
        grad_x[j] = Narrow<T>::of(learned(A(widen(x[j])), A(widen(grad[j])), grid, activation, first, second));
    }
    sum_scale += first;
    sum_zero += second;
  }
  block_sum(sum_scale, sum_zero);
  if (threadIdx.x == 0) {
    partial[split * channels + channel] = sum_scale;
    partial[(splits + split) * channels + channel] = sum_zero;
  }
}

// Short runs: x is [outer, columns] with columns = channels * inner. A block is `width` threads along the columns, V
// each, by kThreads / width down the rows; a split is kPacks rows per thread. partial: [2, splits, columns].
template <int V, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    learned_column_kernel(T* __restrict__ grad_x, double* __restrict__ partial, const T* __restrict__ x,
                          const T* __restrict__ grad, Parameters<A> parameters, Activation<A> activation, int64_t outer,
                          int64_t columns, Divider inner, int64_t splits, int width) {
  using P = Pack<T, V>;
  __shared__ double sums[2][V][kThreads];
  // width is a power of two.
  const int shift = __ffs(width) - 1, height = kThreads >> shift;
  const int x_lane = threadIdx.x & (width - 1), y_lane = threadIdx.x >> shift;
  const unsigned column_blocks = static_cast<unsigned>((columns + width * V - 1) / V >> shift);
  const int64_t split = blockIdx.x / column_blocks;
  const int64_t column = (static_cast<int64_t>(blockIdx.x % column_blocks) * width + x_lane) * V;
  A sum_scale[V] = {}, sum_zero[V] = {};
  if (column < columns) {
    Grid<A> grids[V];
    int64_t channel = inner.quotient(column, columns < int64_t(1) << 31);
    int64_t position = column - channel * inner.divisor;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      grids[v] = parameters.grid(channel);
      if (++position == inner.divisor) {
        position = 0;
        ++channel;
      }
    }
    for (int k = 0; k < kPacks; ++k) {
      const int64_t row = (split * kPacks + k) * height + y_lane;
      if (row >= outer) break;
      const int64_t at = row * columns + column;
      const P values = load_pack<V>(x + at), grads = load_pack<V>(grad + at);
      P result;
#pragma unroll
      for (int v = 0; v < V; ++v)
        result.at[v] = Narrow<T>::of(
            learned(A(widen(values.at[v])), A(widen(grads.at[v])), grids[v], activation, sum_scale[v], sum_zero[v]));
      store_pack(grad_x + at, result);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sums[0][v][threadIdx.x] = sum_scale[v];
    sums[1][v][threadIdx.x] = sum_zero[v];
  }
  __syncthreads();
  if (y_lane != 0 || column >= columns) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    double first = 0, second = 0;
    for (int y = 0; y < height; ++y) {
      first += sums[0][v][y * width + x_lane];
      second += sums[1][v][y * width + x_lane];
    }
    partial[split * columns + column + v] = first;
    partial[(splits + split) * columns + column + v] = second;
  }
}

// One block per channel sums partial [2, splits, channels, inner] over splits and inner, in a fixed order.
template <typename A>
__global__ void learned_finish_kernel(A* __restrict__ grad_scale, A* __restrict__ grad_zero,
                                      const double* __restrict__ partial, const A* __restrict__ scale, int64_t splits,
                                      int64_t channels, int64_t inner) {
  const int64_t channel = blockIdx.x;
  double first = 0, second = 0;
  for (int64_t split = threadIdx.x; split < splits; split += blockDim.x) {
    for (int64_t k = 0; k < inner; ++k) {
      const int64_t at = (split * channels + channel) * inner + k;
      first += partial[at];
      second += partial[at + splits * channels * inner];
    }
  }
  block_sum(first, second);
  if (threadIdx.x == 0) {
    grad_scale[channel] = static_cast<A>(first);
    grad_zero[channel] = static_cast<A>(-second * static_cast<double>(scale[channel]));
  }
}

}  // namespace

// Splits depend on shape, strides, dtype and alignment alone, so that the same bits come out of every run.
LearnedPlan plan_learned(Element element, const Extent& extent, bool is_aligned) {
  LearnedPlan plan{};
  for_element(element, [&](auto value, auto) {
    using T = decltype(value);
    const int64_t columns = extent.channels * extent.inner, outer = extent.numel / columns;
    plan.by_column = extent.channels > 1 && extent.inner < kShortRun;
    const bool whole = plan.by_column ? columns % kWide<T> == 0 : extent.channels == 1 || extent.inner % kWide<T> == 0;
    plan.width = is_aligned && whole ? kWide<T> : 1;
    // Two columns of double per thread would spill.
    if (plan.by_column && sizeof(T) == 8) plan.width = 1;
    if (plan.by_column) {
      plan.threads = 1;
      while (plan.threads < 32 && plan.threads * plan.width < columns) plan.threads *= 2;
      plan.splits = blocks_of(outer, static_cast<int64_t>(kThreads / plan.threads) * kPacks);
      plan.sums = columns;
    } else {
      const int64_t packs = outer * blocks_of(extent.inner, plan.width);
      plan.splits = blocks_of(packs, static_cast<int64_t>(kThreads) * kPacks);
      plan.sums = extent.channels;
    }
  });
  return plan;
}

void launch_learned_backward(Element element, const LearnedPlan& plan, const void* grad, const void* x, void* grad_x,
                             double* partial, void* grad_scale, void* grad_zero, const Extent& extent,
                             const GridSource& source, ActivationKind activation, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const auto parameters = given<A>(source);
    const auto bounds = activation_of<A>(activation);
    auto* to = static_cast<T*>(grad_x);
    const auto* from = static_cast<const T*>(x);
    const auto* above = static_cast<const T*>(grad);
    const int64_t columns = extent.channels * extent.inner, outer = extent.numel / columns;
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      const ChannelWalk walk(extent, V);
      const int64_t packs = outer * walk.per_run.divisor;
      launch(learned_run_kernel<V, T, A>, plan.splits * extent.channels, kThreads, stream, to, partial, from, above,
             parameters, bounds, walk, packs, plan.splits);
    };
    const auto run_columns = [&](auto width) {
      constexpr int V = decltype(width)::value;
      launch(learned_column_kernel<V, T, A>, plan.splits * blocks_of(columns, int64_t(plan.threads) * V), kThreads,
             stream, to, partial, from, above, parameters, bounds, outer, columns, Divider(extent.inner), plan.splits,
             plan.threads);
    };
    constexpr std::integral_constant<int, kWide<T>> wide;
    constexpr std::integral_constant<int, 1> narrow;
    if (!plan.by_column) {
      plan.width == 1 ? run(narrow) : run(wide);
    } else if constexpr (sizeof(T) == 8) {
      run_columns(narrow);
    } else {
      plan.width == 1 ? run_columns(narrow) : run_columns(wide);
    }
    const int64_t inner = plan.by_column ? extent.inner : 1;
    launch(learned_finish_kernel<A>, extent.channels, plan.splits > 256 ? 512 : 32, stream, static_cast<A*>(grad_scale),
           static_cast<A*>(grad_zero), static_cast<const double*>(partial), parameters.scale, plan.splits,
           extent.channels, inner);
  });
}

}  // namespace clusterq
