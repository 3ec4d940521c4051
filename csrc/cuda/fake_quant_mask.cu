// Fake-quantize with a saved mask on CUDA, and the backward that reads nothing else. Bytes per element of float32:
// forward and backward 8.125 each; one launch. The bits of a byte meet by shuffles, so each byte is written once.
#include "fake_quant_elementwise.h"

namespace clusterq {
namespace {

template <typename T, typename A, typename Source>
void masked(const void* x, void* y, uint8_t* mask, const Extent& extent, const Source& source,
            ActivationKind activation, Rule rule, bool reverse, cudaStream_t stream) {
  const Activation<A> bounds = activation_of<A>(activation);
  const MaskedForward<T, A, Source> op{static_cast<const T*>(x), nullptr, static_cast<T*>(y), mask, source, bounds,
                                       to_pass(bounds, rule),    rule};
  launch_elementwise(op, extent, reverse, stream);
}

// The gradient is bits here: kept or replaced by 0.
template <typename Bits, int V>
__global__ void __launch_bounds__(kThreads)
    masked_backward_kernel(Bits* __restrict__ grad_x, const Bits* __restrict__ grad, const uint8_t* __restrict__ mask,
                           int64_t numel) {
  constexpr int kPacks = sizeof(Bits) == 8 ? 1 : 2;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * (kThreads * kPacks * V);
  Pack<Bits, V> grads[kPacks];
  unsigned bytes[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = start + (k * kThreads + static_cast<int>(threadIdx.x)) * V;
    if (at >= numel) continue;
    grads[k] = load_some<V>(grad + at, numel - at);
    bytes[k] = mask[at / 8] >> (at % 8);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = start + (k * kThreads + static_cast<int>(threadIdx.x)) * V;
    if (at >= numel) continue;
    Pack<Bits, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.at[v] = bytes[k] >> v & 1 ? grads[k].at[v] : Bits(0);
    store_some(grad_x + at, result, numel - at);
  }
}

}  // namespace

void launch_masked(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                   const GridSource& source, ActivationKind activation, Rule rule, bool reverse, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using A = decltype(arithmetic);
    masked<decltype(value), A>(x, y, mask, extent, given<A>(source), activation, rule, reverse, stream);
  });
}

void launch_masked_backward(int element_bytes, const void* grad, const uint8_t* mask, void* grad_x, int64_t numel,
                            cudaStream_t stream) {
  const auto run = [&](auto element) {
    using Bits = decltype(element);
    auto* to = static_cast<Bits*>(grad_x);
    const auto* from = static_cast<const Bits*>(grad);
    const auto start = [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t blocks = blocks_of(numel, int64_t(kThreads) * (sizeof(Bits) == 8 ? 1 : 2) * V);
      launch(masked_backward_kernel<Bits, V>, blocks, kThreads, stream, to, from, mask, numel);
    };
    if (aligned(from) && aligned(to)) return start(std::integral_constant<int, kWide<Bits>>{});
    start(std::integral_constant<int, 1>{});
  };
  if (element_bytes == 2) return run(uint16_t{});
  if (element_bytes == 4) return run(uint32_t{});
  run(uint64_t{});
}

}  // namespace clusterq
