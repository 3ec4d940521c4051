// Weights with ranges of their own on CUDA: range search and quantization of all weights of a network in one launch (up
// to kMost of them). A warp or a block holds a channel in registers in between; what does not fit is read again, from
// the cache. Bytes per element of float32: 8.
#include <algorithm>

#include "fake_quant.h"

namespace clusterq {
namespace {

// Packs of a channel that a thread holds.
constexpr int kHeld = 8;
// A table of this many fits into the 4 KB of parameters that every launch may have.
constexpr int kMost = 55;

struct Entry {
  const void* w;
  void* y;
  int64_t inner, packs;
  Divider per_run;
  // Of the launch, and of the scales of all weights.
  uint32_t first_block, first_channel, channels;
  // Threads to the channel: 32 or kThreads.
  uint16_t lanes;
  bool wide, small;
};

template <typename A>
struct Table {
  Entry entries[kMost];
  int count, quant_min, quant_max;
  bool symmetric;
  A *scale, *zero_point;
};
static_assert(sizeof(Table<double>) <= 4096);

template <typename A>
__device__ __forceinline__ void include(A v, A& low, A& high) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  const bool finite = (v > -inf) & (v < inf);
  low = finite & (v < low) ? v : low;
  high = finite & (v > high) ? v : high;
}

template <int V, typename T, typename A>
__device__ __forceinline__ void quantize_channel(const Table<A>& table, const Entry& entry, int64_t channel, int lane) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  const T* const from = static_cast<const T*>(entry.w);
  T* const to = static_cast<T*>(entry.y);
  const int64_t packs = channel < entry.channels ? entry.packs : 0;
  const auto at = [&](int64_t pack) {
    const int64_t run = entry.packs == entry.per_run.divisor ? 0 : entry.per_run.quotient(pack, entry.small);
    return (run * entry.channels + channel) * entry.inner + (pack - run * entry.per_run.divisor) * V;
  };
  Pack<T, V> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = lane + k * entry.lanes;
    if (i < packs) held[k] = load_pack<V>(from + at(i));
  }
  A low = inf, high = -inf;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (lane + k * entry.lanes >= packs) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) include(A(widen(held[k].at[v])), low, high);
  }
  for (int64_t i = lane + int64_t(kHeld) * entry.lanes; i < packs; i += entry.lanes) {
    const Pack<T, V> pack = load_pack<V>(from + at(i));
#pragma unroll
    for (int v = 0; v < V; ++v) include(A(widen(pack.at[v])), low, high);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const A other_low = __shfl_xor_sync(kFullWarp, low, offset), other_high = __shfl_xor_sync(kFullWarp, high, offset);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (entry.lanes > 32) {
    __shared__ A lows[kThreads / 32], highs[kThreads / 32];
    if (threadIdx.x % 32 == 0) {
      lows[threadIdx.x / 32] = low;
      highs[threadIdx.x / 32] = high;
    }
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) {
      low = lows[w] < low ? lows[w] : low;
      high = highs[w] > high ? highs[w] : high;
    }
  }
  // Adding 0 turns -0 into +0.
  const Grid<A> grid = range_to_grid(low + A(0), high + A(0), table.quant_min, table.quant_max, table.symmetric);
  if (lane == 0 && channel < entry.channels) {
    table.scale[entry.first_channel + channel] = grid.scale;
    table.zero_point[entry.first_channel + channel] = grid.zero_point;
  }
  const Steps<A> steps = to_steps(grid, Activation<A>{-inf, inf});
  const auto store = [&](int64_t i, const Pack<T, V>& pack) {
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.at[v] = Narrow<T>::of(fake_quantize(A(widen(pack.at[v])), steps));
    store_pack(to + at(i), result);
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (lane + k * entry.lanes < packs) store(lane + k * entry.lanes, held[k]);
  for (int64_t i = lane + int64_t(kHeld) * entry.lanes; i < packs; i += entry.lanes)
    store(i, load_pack<V>(from + at(i)));
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) weights_kernel(const __grid_constant__ Table<A> table) {
  const Entry& entry = table.entries[find_entry(table.entries, table.count, blockIdx.x)];
  const int64_t block = blockIdx.x - entry.first_block;
  const int64_t channel = block * (kThreads / entry.lanes) + threadIdx.x / entry.lanes;
  const int lane = threadIdx.x % entry.lanes;
  if (entry.wide) {
    quantize_channel<kWide<T>, T>(table, entry, channel, lane);
  } else {
    quantize_channel<1, T>(table, entry, channel, lane);
  }
}

}  // namespace

void launch_weights(Element element, const Weight* weights, int64_t count, const CodeRange& codes, void* scale,
                    void* zero_point, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    Table<A> table{};
    table.quant_min = static_cast<int>(codes.quant_min);
    table.quant_max = static_cast<int>(codes.quant_max);
    table.symmetric = codes.symmetric;
    table.scale = static_cast<A*>(scale);
    table.zero_point = static_cast<A*>(zero_point);
    int64_t blocks = 0;
    const auto flush = [&] {
      if (blocks > 0) launch(weights_kernel<T, A>, blocks, kThreads, stream, table);
      table.count = 0;
      blocks = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      const Weight& weight = weights[i];
      if (weight.channels == 0) continue;
      if (table.count == kMost) flush();
      Entry& entry = table.entries[table.count++];
      entry.w = weight.w;
      entry.y = weight.y;
      entry.inner = weight.inner;
      entry.wide = aligned(weight.w) && aligned(weight.y) && weight.inner % kWide<T> == 0;
      const int64_t per_run = entry.wide ? weight.inner / kWide<T> : weight.inner;
      entry.per_run = Divider(std::max<int64_t>(per_run, 1));
      entry.packs = weight.outer * per_run;
      entry.small = entry.packs <= int64_t(1) << 30;
      entry.first_block = static_cast<uint32_t>(blocks);
      entry.first_channel = static_cast<uint32_t>(weight.first_channel);
      entry.channels = static_cast<uint32_t>(weight.channels);
      entry.lanes = entry.packs <= 32 * kHeld ? 32 : kThreads;
      blocks += blocks_of(weight.channels, kThreads / entry.lanes);
    }
    flush();
  });
}

}  // namespace clusterq
