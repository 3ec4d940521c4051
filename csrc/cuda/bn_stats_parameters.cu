// Gradients of weight and bias of eval-mode BatchNorm on CUDA: sums of grad * (x - mean) and of grad. Bytes per element
// of float32: 8. A thread adds a few rows in the arithmetic type, the rest is float64 in a fixed order.
#include "bn_stats_device.h"

namespace clusterq {
namespace {

// Rows that a thread loads before it uses the first.
constexpr int kAhead = 4;

template <int V, typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads)
    parameter_kernel(double* __restrict__ partial, const T* __restrict__ grad, const T* __restrict__ x,
                     const A* __restrict__ mean, Divider inner, const ParameterPlan plan) {
  __shared__ A room[2][kWarps][kMostColumns<V>];
  const int lanes = plan.lanes, shift = __ffs(lanes) - 1, height = kStatisticsThreads >> shift;
  const unsigned tiles = static_cast<unsigned>(plan.tiles), split = blockIdx.x / tiles,
                 tile = blockIdx.x - split * tiles;
  const int64_t first_column = static_cast<int64_t>(tile) * lanes * V;
  const int64_t column = first_column + (threadIdx.x & (lanes - 1)) * V;
  const int64_t start = split * plan.part, end = start + part_length(plan.rows, plan.part, split);
  A weights[V] = {}, biases[V] = {};
  if (column < plan.columns) {
    const bool small = plan.columns < int64_t(1) << 31;
    int64_t channel = inner.quotient(column, small), rest = inner.divisor - (column - channel * inner.divisor);
    A center[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      center[v] = mean[channel];
      if (v + 1 < V && --rest == 0) {
        rest = inner.divisor;
        ++channel;
      }
    }
    for (int64_t row = start + (threadIdx.x >> shift); row < end; row += kAhead * height) {
      Pack<T, V> values[kAhead], grads[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (row + k * height >= end) continue;
        values[k] = load_pack<V>(x + (row + k * height) * plan.columns + column);
        grads[k] = load_pack<V>(grad + (row + k * height) * plan.columns + column);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (row + k * height >= end) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A g = widen(grads[k].at[v]);
          weights[v] = multiply_add(g, A(widen(values[k].at[v])) - center[v], weights[v]);
          biases[v] += g;
        }
      }
    }
  }
  leave_sums<V>(weights, lanes, room[0][threadIdx.x / 32]);
  leave_sums<V>(biases, lanes, room[1][threadIdx.x / 32]);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= lanes * V || first_column + threadIdx.x >= plan.columns) return;
  double weight = 0, bias = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weight += room[0][w][threadIdx.x];
    bias += room[1][w][threadIdx.x];
  }
  const int64_t at = split * plan.columns + first_column + threadIdx.x;
  partial[at] = weight;
  partial[at + plan.splits * plan.columns] = bias;
}

// One block per channel sums partial over splits and the channel's columns.
template <typename A>
__global__ void __launch_bounds__(512)
    parameter_finish_kernel(A* __restrict__ dweight, A* __restrict__ dbias, const double* __restrict__ partial,
                            const Norm<A> norm, Divider inner, bool small, const ParameterPlan plan) {
  const int64_t channel = blockIdx.x, values = plan.splits * inner.divisor;
  double weight = 0, bias = 0;
  for (int64_t i = threadIdx.x; i < values; i += blockDim.x) {
    const int64_t split = inner.quotient(i, small);
    const int64_t at = split * plan.columns + channel * inner.divisor + (i - split * inner.divisor);
    weight += partial[at];
    bias += partial[at + plan.splits * plan.columns];
  }
  block_sum(weight, bias);
  if (threadIdx.x != 0) return;
  dweight[channel] = static_cast<A>(weight * static_cast<double>(inverse_root(norm.var[channel] + norm.eps)));
  dbias[channel] = static_cast<A>(bias);
}

}  // namespace

void launch_parameter_backward(Element element, const void* grad, const void* x, const ParameterPlan& plan,
                               const Normalization& norm, double* partial, void* dweight, void* dbias,
                               cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Divider inner(plan.inner);
    const Norm<A> parameters = norm_of<A>(norm);
    const auto kernel = plan.width == 1 ? parameter_kernel<1, T, A> : parameter_kernel<kWide<T>, T, A>;
    launch(kernel, plan.blocks, kStatisticsThreads, stream, partial, static_cast<const T*>(grad),
           static_cast<const T*>(x), parameters.mean, inner, plan);
    const int64_t values = plan.splits * plan.inner;
    launch(parameter_finish_kernel<A>, plan.columns / plan.inner,
           values > 512  ? 512
           : values > 64 ? 128
                         : 32,
           stream, static_cast<A*>(dweight), static_cast<A*>(dbias), static_cast<const double*>(partial), parameters,
           inner, values < int64_t(1) << 31, plan);
  });
}

}  // namespace clusterq
