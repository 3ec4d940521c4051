// Fake-quantize on CUDA: forward and masked backward. Formulas: numerics.h; compiled with --fmad=false. Bytes per
// element of float32: forward 8, backward 12, each input read once and each output written once.
#include "fake_quant.h"

namespace clusterq {
namespace {

// Packs that a thread has in flight; one where 64-bit divisions need the registers.
template <typename T, typename Index>
constexpr int kInFlight = sizeof(T) == 8 || sizeof(Index) == 8 ? 1 : 2;

// `prepare` does once what does not depend on x.
struct Forward {
  static constexpr bool kNeedsGrad = false;
  template <typename A>
  static __device__ __forceinline__ Steps<A> prepare(const Grid<A>& grid, const Activation<A>& activation) {
    return to_steps(grid, activation);
  }
  template <typename A>
  static __device__ __forceinline__ A apply(A x, A, const Steps<A>& steps, const Activation<A>&) {
    return fake_quantize(x, steps);
  }
  template <typename A>
  static __device__ __forceinline__ A apply(A x, A, const Grid<A>& grid, const Activation<A>& activation) {
    return fake_quantize(clamp(x, activation.low, activation.high), grid);
  }
};

struct Backward {
  static constexpr bool kNeedsGrad = true;
  template <typename A>
  static __device__ __forceinline__ Grid<A> prepare(const Grid<A>& grid, const Activation<A>&) {
    return grid;
  }
  template <typename A>
  static __device__ __forceinline__ A apply(A x, A grad, const Grid<A>& grid, const Activation<A>& activation) {
    return masked_gradient(x, grad, grid, activation);
  }
};

// How a pack finds its channel. kOne: there is one scale. kRun: a pack never leaves its run. kAny: it may.
enum class Channels { kOne, kRun, kAny };

// A thread takes kInFlight packs, kThreads apart, all loads before the first use. The numel % V elements of the tail go
// to the last block. Index holds element indices: 32 bits where they suffice, as the division by a run length costs
// most here.
template <typename Op, Channels kChannels, int V, typename Index, typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(T* __restrict__ out, const T* __restrict__ x, const T* __restrict__ grad,
                       Parameters<A> parameters, Activation<A> activation, int64_t numel, int64_t inner,
                       int64_t channels) {
  using P = Pack<T, V>;
  const int64_t packs = numel / V;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight<T, Index>)+threadIdx.x;
  P values[kInFlight<T, Index>], grads[kInFlight<T, Index>];
  // Before the loads: a 64-bit division is a subroutine, around which data would have to be saved.
  Index channel_of[kInFlight<T, Index>] = {}, position_of[kInFlight<T, Index>] = {};
  if constexpr (kChannels != Channels::kOne) {
#pragma unroll
    for (int k = 0; k < kInFlight<T, Index>; ++k) {
      const Index element = static_cast<Index>((first + k * kThreads) * V), run = element / static_cast<Index>(inner);
      channel_of[k] = run % static_cast<Index>(channels);
      position_of[k] = element - run * static_cast<Index>(inner);
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight<T, Index>; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < packs) {
      values[k] = load_pack<V>(x + i * V);
      if constexpr (Op::kNeedsGrad) grads[k] = load_pack<V>(grad + i * V);
    }
  }
  Grid<A> only{};
  if constexpr (kChannels == Channels::kOne) only = parameters.grid(0);
  const auto value = [&](T element, T upstream, const auto& ready) {
    A g = 0;
    if constexpr (Op::kNeedsGrad) g = widen(upstream);
    return Narrow<T>::of(Op::apply(A(widen(element)), g, ready, activation));
  };
#pragma unroll
  for (int k = 0; k < kInFlight<T, Index>; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= packs) continue;
    P result;
    if constexpr (kChannels == Channels::kAny) {
      Index position = position_of[k], channel = channel_of[k];
      Grid<A> grid = parameters.grid(channel);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        result.at[v] = value(values[k].at[v], grads[k].at[v], grid);
        if (v + 1 < V && ++position == static_cast<Index>(inner)) {
          position = 0;
          if (++channel == static_cast<Index>(channels)) channel = 0;
          grid = parameters.grid(channel);
        }
      }
    } else {
      const auto ready = Op::prepare(kChannels == Channels::kOne ? only : parameters.grid(channel_of[k]), activation);
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = value(values[k].at[v], grads[k].at[v], ready);
    }
    store_pack(out + i * V, result);
  }
  const int64_t i = packs * V + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && i < numel) {
    Grid<A> grid = only;
    if constexpr (kChannels != Channels::kOne)
      grid = parameters.grid(static_cast<Index>(i) / static_cast<Index>(inner) % static_cast<Index>(channels));
    out[i] = value(x[i], Op::kNeedsGrad ? grad[i] : x[i], grid);
  }
}

template <typename Op, Channels kChannels, typename Index, typename T, typename A>
void launch_elementwise(T* out, const T* x, const T* grad, const Parameters<A>& parameters,
                        const Activation<A>& activation, const Walk& walk, int64_t numel, cudaStream_t stream) {
  const auto run = [&](auto width) {
    constexpr int V = decltype(width)::value;
    const unsigned blocks = grid_size(ceil_div(ceil_div(numel, V), kThreads * kInFlight<T, Index>));
    elementwise_kernel<Op, kChannels, V, Index>
        <<<blocks, kThreads, 0, stream>>>(out, x, grad, parameters, activation, numel, walk.inner, walk.channels);
  };
  // Slices may start anywhere.
  const bool wide = aligned(x) && aligned(out) && (!Op::kNeedsGrad || aligned(grad));
  if (wide) return run(std::integral_constant<int, kWide<T>>{});
  run(std::integral_constant<int, 1>{});
}

template <typename Op>
Tensor elementwise(const Tensor& input, const Tensor* grad_output, const Tensor& scale, const Tensor& zero_point,
                   int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, const std::string& activation) {
  check_parameters(input, scale, zero_point);
  const Launch launch(input);
  const Tensor x = dense(input);
  const Tensor grad = grad_output == nullptr ? x : with_strides_of(*grad_output, x);
  check_device(grad, x, "grad");
  const Tensor s = packed(scale), z = packed(zero_point);
  const Tensor out = torch::stable::empty_like(x);
  const Walk walk(x, scale, axis);
  const int64_t numel = x.numel();
  if (numel == 0) return out;
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto parameters = parameters_of<A>(s, z, quant_min, quant_max);
    const auto bounds = activation_of<A>(activation);
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* above = static_cast<const T*>(grad.const_data_ptr());
    const auto run = [&](auto kind, auto index) {
      launch_elementwise<Op, decltype(kind)::value, decltype(index)>(to, from, above, parameters, bounds, walk, numel,
                                                                     launch.stream());
    };
    const bool small = numel <= std::numeric_limits<uint32_t>::max();
    if (walk.channels == 1) return run(std::integral_constant<Channels, Channels::kOne>{}, uint32_t{});
    if (walk.inner % kWide<T> == 0) {
      constexpr std::integral_constant<Channels, Channels::kRun> kind;
      return small ? run(kind, uint32_t{}) : run(kind, uint64_t{});
    }
    constexpr std::integral_constant<Channels, Channels::kAny> kind;
    return small ? run(kind, uint32_t{}) : run(kind, uint64_t{});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                             int64_t quant_max, std::optional<int64_t> axis, std::string activation) {
  return elementwise<Forward>(x, nullptr, scale, zero_point, quant_min, quant_max, axis, activation);
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                              std::string activation) {
  return elementwise<Backward>(x, &grad, scale, zero_point, quant_min, quant_max, axis, activation);
}

}  // namespace

std::vector<std::string> fake_quant_ops() {
  return {"fake_quantize", "fake_quantize_backward", "fake_quantize_learned_backward"};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&clusterq::fake_quantize_forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&clusterq::fake_quantize_backward));
}
