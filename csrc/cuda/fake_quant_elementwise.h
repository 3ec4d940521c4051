// The walk of every fake-quantize kernel that maps elements one by one: each tensor is read or written once.
#pragma once

#include <algorithm>

#include "fake_quant.h"

namespace clusterq {
namespace {

// How a pack finds its channel. kOne: there is one. kRun: a pack never leaves its run. kAny: it may.
enum class Channels { kOne, kRun, kAny };

template <Channels kChannels>
constexpr int kElementwiseThreads = kChannels == Channels::kAny ? 128 : kThreads;

// Packs that a thread has in flight.
template <typename Op, Channels kChannels>
constexpr int kInFlight = kChannels == Channels::kAny || sizeof(typename Op::In) == 8 ? 1 : 2;

// A thread takes kInFlight packs, a block apart, all loads before the first use. Grids of several channels are made
// once per block. `Op` has In, Out, Ready (what is known of a channel before its elements), x, grad, out, mask. Where
// making a grid calls subroutines of division (kDivides), one thread does, and no data waits in registers meanwhile.
template <typename Op, Channels kChannels, int V>
__global__ void __launch_bounds__(kElementwiseThreads<kChannels>) elementwise_kernel(const Op op, const Shape shape) {
  using In = typename Op::In;
  using Out = typename Op::Out;
  constexpr int kBlock = kElementwiseThreads<kChannels>, kPacks = kInFlight<Op, kChannels>, kTile = kBlock * kPacks * V;
  // A run is at least a pack long.
  constexpr int kSlots = kChannels == Channels::kOne ? 1 : (kChannels == Channels::kRun ? kTile / V : kTile) + 1;
  constexpr bool kTabled = kChannels != Channels::kOne || Op::kDivides;
  const int64_t start = shape.block(blockIdx.x, gridDim.x) * kTile;
  Pack<In, V> values[kPacks];
  Pack<In, V> grads[kPacks];
  const auto load = [&] {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = start + (k * kBlock + static_cast<int>(threadIdx.x)) * V;
      if (at >= shape.numel) continue;
      values[k] = load_some<V>(op.x + at, shape.numel - at);
      if constexpr (Op::kGrad) grads[k] = load_some<V>(op.grad + at, shape.numel - at);
    }
  };
  if constexpr (!Op::kDivides) load();
  op.publish(shape.channels.divisor);
  __shared__ typename Op::Ready table[kSlots];
  typename Op::Ready only;
  const int64_t end = start + kTile < shape.numel ? start + kTile : shape.numel;
  const Window window(shape, start, end > start ? end : start + 1);
  if constexpr (kTabled) {
    for (int slot = threadIdx.x; slot < (kChannels == Channels::kOne ? 1 : window.slots); slot += kBlock)
      table[slot] = op.ready(kChannels == Channels::kOne ? 0 : window.channel(shape, slot));
    __syncthreads();
    if constexpr (kChannels == Channels::kOne) only = table[0];
  } else {
    only = op.ready(0);
  }
  if constexpr (Op::kDivides) load();
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = start + (k * kBlock + static_cast<int>(threadIdx.x)) * V, left = shape.numel - at;
    unsigned bits = 0;
    if (left > 0) {
      Pack<Out, V> result;
      int slot = 0, rest = 0;
      if constexpr (kChannels != Channels::kOne) {
        slot = window.slot(shape, at, rest);
        only = table[slot];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        bool inside = false;
        result.at[v] = op.value(values[k].at[v], Op::kGrad ? grads[k].at[v] : values[k].at[v], only, inside);
        bits |= static_cast<unsigned>(inside) << v;
        if constexpr (kChannels == Channels::kAny) {
          if (v + 1 < V && v + 1 < left) {
            const int before = slot;
            window.advance(shape, slot, rest);
            if (slot != before) only = table[slot];
          }
        }
      }
      store_some(op.out + at, result, left);
      if (left < V) bits &= (1u << left) - 1;
    }
    if constexpr (Op::kMask) {
      bits = gather_byte<V>(bits);
      if (left > 0 && threadIdx.x % (8 / V) == 0) op.mask[at / 8] = static_cast<uint8_t>(bits);
    }
  }
}

// Without `kRun` one kernel serves packs that leave their run and those that do not.
template <bool kRun = true, typename Op>
void launch_elementwise(const Op& op, const Extent& extent, bool reverse, cudaStream_t stream) {
  const Shape shape(extent, reverse);
  const auto run = [&](auto kind, auto width) {
    constexpr Channels kChannels = decltype(kind)::value;
    constexpr int V = decltype(width)::value, kBlock = kElementwiseThreads<kChannels>;
    // One block at least, for what is written per channel.
    const int64_t blocks = blocks_of(extent.numel, int64_t(kBlock) * kInFlight<Op, kChannels> * V);
    launch(elementwise_kernel<Op, kChannels, V>, std::max<int64_t>(blocks, 1), kBlock, stream, op, shape);
  };
  constexpr std::integral_constant<Channels, Channels::kAny> any;
  constexpr int V = std::min(kWide<typename Op::In>, kWide<typename Op::Out>);
  constexpr std::integral_constant<int, V> wide;
  // Slices may start anywhere.
  if (!aligned(op.x, V * sizeof(typename Op::In)) || !aligned(op.out, V * sizeof(typename Op::Out)) ||
      (Op::kGrad && !aligned(op.grad, V * sizeof(typename Op::In))))
    return run(any, std::integral_constant<int, 1>{});
  if (extent.channels == 1) return run(std::integral_constant<Channels, Channels::kOne>{}, wide);
  if constexpr (kRun) {
    if (extent.inner % V == 0) return run(std::integral_constant<Channels, Channels::kRun>{}, wide);
  }
  run(any, wide);
}

// fake_quantize.
template <typename T, typename A, typename Source>
struct Forward {
  using In = T;
  using Out = T;
  using Ready = Steps<A>;
  static constexpr bool kGrad = false, kMask = false, kDivides = Source::kDivides;
  const T *x, *grad;
  T* out;
  uint8_t* mask;
  Source source;
  Activation<A> activation;

  __device__ __forceinline__ void publish(int64_t channels) const { source.publish(channels); }
  __device__ __forceinline__ Ready ready(int64_t channel) const { return to_steps(source.grid(channel), activation); }
  __device__ __forceinline__ T value(T v, T, const Ready& steps, bool&) const {
    return Narrow<T>::of(fake_quantize(A(widen(v)), steps));
  }
};

template <typename A>
struct Gate {
  Steps<A> steps;
  Pass<A> pass;
};

// fake_quantize with one bit per element: whether the gradient reaches it.
template <typename T, typename A, typename Source>
struct MaskedForward {
  using In = T;
  using Out = T;
  using Ready = Gate<A>;
  static constexpr bool kGrad = false, kMask = true, kDivides = Source::kDivides;
  const T *x, *grad;
  T* out;
  uint8_t* mask;
  Source source;
  Activation<A> activation;
  Pass<A> pass;
  Rule rule;

  __device__ __forceinline__ void publish(int64_t channels) const { source.publish(channels); }
  __device__ __forceinline__ Ready ready(int64_t channel) const {
    const Grid<A> grid = source.grid(channel);
    return {to_steps(grid, activation), rule == Rule::kReal ? to_real(pass, grid) : pass};
  }
  __device__ __forceinline__ T value(T v, T, const Ready& gate, bool& inside) const {
    const A x = widen(v);
    inside = passes(x, round_even(x * gate.steps.inverse), gate.steps, gate.pass, rule != Rule::kCodes);
    return Narrow<T>::of(fake_quantize(x, gate.steps));
  }
};

}  // namespace
}  // namespace clusterq
