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
template <int V, typename Index, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    learned_run_kernel(T* __restrict__ grad_x, double* __restrict__ partial, const T* __restrict__ x,
                       const T* __restrict__ grad, Parameters<A> parameters, Activation<A> activation, int64_t outer,
                       int64_t channels, int64_t inner, int64_t splits) {
  using P = Pack<T, V>;
  const unsigned count = static_cast<unsigned>(channels);
  const int64_t channel = blockIdx.x % count, split = blockIdx.x / count;
  const Grid<A> grid = parameters.grid(channel);
  // Only the single run of a tensor with one scale may end within a pack.
  const Index per_run = static_cast<Index>((inner + V - 1) / V);
  const int64_t packs = outer * per_run;
  double sum_scale = 0, sum_zero = 0;
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = (split * kPacks + k) * kThreads + threadIdx.x;
    if (i >= packs) break;
    const Index run = static_cast<Index>(i) / per_run, position = static_cast<Index>(i) - run * per_run;
    const int64_t at = (static_cast<int64_t>(run) * channels + channel) * inner + static_cast<int64_t>(position) * V;
    A first = 0, second = 0;
    if (static_cast<int64_t>(position) * V + V <= inner) {
      const P values = load_pack<V>(x + at), grads = load_pack<V>(grad + at);
      P result;
#pragma unroll
      for (int v = 0; v < V; ++v)
        result.at[v] =
            Narrow<T>::of(learned(A(widen(values.at[v])), A(widen(grads.at[v])), grid, activation, first, second));
      store_pack(grad_x + at, result);
    } else {
      for (int64_t j = at; j < at + inner - static_cast<int64_t>(position) * V; ++j)
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
template <int V, typename Index, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    learned_column_kernel(T* __restrict__ grad_x, double* __restrict__ partial, const T* __restrict__ x,
                          const T* __restrict__ grad, Parameters<A> parameters, Activation<A> activation, int64_t outer,
                          int64_t columns, int64_t inner, int64_t splits, int width) {
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
    Index channel = static_cast<Index>(column) / static_cast<Index>(inner);
    Index position = static_cast<Index>(column) - channel * static_cast<Index>(inner);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      grids[v] = parameters.grid(channel);
      if (++position == static_cast<Index>(inner)) {
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

// Splits depend on shape, strides and dtype alone, so that the same bits come out of every run.
std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(const Tensor& grad_output, const Tensor& input,
                                                                  const Tensor& scale, const Tensor& zero_point,
                                                                  int64_t quant_min, int64_t quant_max,
                                                                  std::optional<int64_t> axis, std::string activation) {
  check_parameters(input, scale, zero_point);
  const Launch launch(input);
  const Tensor x = dense(input), grad = with_strides_of(grad_output, x);
  check_device(grad, x, "grad");
  const Tensor s = packed(scale), z = packed(zero_point);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_scale = torch::stable::empty_like(s), grad_zero = torch::stable::empty_like(z);
  const Walk walk(x, scale, axis);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_scale);
    torch::stable::zero_(grad_zero);
    return {grad_x, grad_scale, grad_zero};
  }
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto parameters = parameters_of<A>(s, z, quant_min, quant_max);
    const auto bounds = activation_of<A>(activation);
    auto* to = static_cast<T*>(grad_x.mutable_data_ptr());
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* above = static_cast<const T*>(grad.const_data_ptr());
    const bool wide = aligned(from) && aligned(above) && aligned(to);
    const bool by_column = walk.channels > 1 && walk.inner < kShortRun;
    const int64_t columns = walk.channels * walk.inner;
    const int64_t sums = by_column ? columns : walk.channels;
    Tensor partial;
    int64_t splits = 0;
    const auto allocate = [&](int64_t count) {
      splits = count;
      partial = torch::stable::new_empty(x, {2 * splits * sums}, ScalarType::Double);
      return static_cast<double*>(partial.mutable_data_ptr());
    };
    const auto run = [&](auto width, auto index) {
      constexpr int V = decltype(width)::value;
      using Index = decltype(index);
      if (by_column) {
        // Two columns of double per thread would spill around the subroutine of its division.
        constexpr int W = sizeof(T) == 8 ? 1 : V;
        int threads = 1;
        while (threads < 32 && threads * W < columns) threads *= 2;
        double* to_partial = allocate(ceil_div(walk.outer, static_cast<int64_t>(kThreads / threads) * kPacks));
        const unsigned blocks = grid_size(splits * ceil_div(columns, static_cast<int64_t>(threads) * W));
        learned_column_kernel<W, Index><<<blocks, kThreads, 0, launch.stream()>>>(
            to, to_partial, from, above, parameters, bounds, walk.outer, columns, walk.inner, splits, threads);
      } else {
        const int64_t packs = walk.outer * ceil_div(walk.inner, V);
        double* to_partial = allocate(ceil_div(packs, static_cast<int64_t>(kThreads) * kPacks));
        learned_run_kernel<V, Index><<<grid_size(splits * walk.channels), kThreads, 0, launch.stream()>>>(
            to, to_partial, from, above, parameters, bounds, walk.outer, walk.channels, walk.inner, splits);
      }
    };
    const bool whole = by_column ? columns % kWide<T> == 0 : walk.channels == 1 || walk.inner % kWide<T> == 0;
    const bool small = x.numel() <= std::numeric_limits<uint32_t>::max();
    const auto with_width = [&](auto width) { small ? run(width, uint32_t{}) : run(width, uint64_t{}); };
    if (wide && whole) {
      with_width(std::integral_constant<int, kWide<T>>{});
    } else {
      with_width(std::integral_constant<int, 1>{});
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const int64_t inner = by_column ? walk.inner : 1;
    const unsigned threads = splits > 256 ? 512 : 32, blocks = grid_size(walk.channels);
    learned_finish_kernel<A><<<blocks, threads, 0, launch.stream()>>>(
        static_cast<A*>(grad_scale.mutable_data_ptr()), static_cast<A*>(grad_zero.mutable_data_ptr()),
        static_cast<const double*>(partial.const_data_ptr()), parameters.scale, splits, walk.channels, inner);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_x, grad_scale, grad_zero};
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CUDA, m) {
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&clusterq::fake_quantize_learned_backward));
}
