// Range of finite elements per channel on CUDA in one launch, alone or while x is quantized with the range so far.
// Bytes per element of float32: 4, with quantization 8.125. Minima and maxima are whole numbers in the order of the
// values: blocks join them by atomics, whose order changes nothing, and the last block to finish uses and clears them.
#include <algorithm>

#include "fake_quant_elementwise.h"
#include "word_pool.h"

namespace clusterq {
namespace {

// Scratch of the library, zero from the start and after every launch: see WordPool.
constexpr int64_t kPool = int64_t(1) << 20;
__device__ alignas(128) uint32_t pool[kPool];

// Whole numbers in the order of the values; 0 belongs to no value.
template <typename A>
struct Ordered;
template <>
struct Ordered<float> {
  using Bits = unsigned;
  static __device__ __forceinline__ Bits of(float v) {
    const Bits bits = __float_as_uint(v);
    return bits ^ (static_cast<Bits>(static_cast<int>(bits) >> 31) | 0x80000000u);
  }
  static __device__ __forceinline__ float value(Bits bits) {
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
  }
};
template <>
struct Ordered<double> {
  using Bits = unsigned long long;
  static __device__ __forceinline__ Bits of(double v) {
    const Bits bits = static_cast<Bits>(__double_as_longlong(v));
    return bits ^ (static_cast<Bits>(static_cast<long long>(bits) >> 63) | 0x8000000000000000ull);
  }
  static __device__ __forceinline__ double value(Bits bits) {
    const Bits flip = bits >> 63 ? 0x8000000000000000ull : 0xffffffffffffffffull;
    return __longlong_as_double(static_cast<long long>(bits ^ flip));
  }
};

// Words before the ranges: the counter of blocks, padded.
constexpr int kHeader = 2;

// What a launch counts: elements from `least` to `most`, infinities only where the activation makes them finite.
template <typename A>
struct Kept {
  A least, most;
  explicit Kept(const Activation<A>& activation) {
    constexpr A inf = std::numeric_limits<A>::infinity(), largest = std::numeric_limits<A>::max();
    least = activation.low > -inf ? -inf : -largest;
    most = activation.high < inf ? inf : largest;
  }
};

template <typename A>
struct Range {
  A low, high;
  __device__ __forceinline__ void clear() {
    low = std::numeric_limits<A>::infinity();
    high = -std::numeric_limits<A>::infinity();
  }
  // The minimum of a number and a NaN is the number.
  __device__ __forceinline__ void extend(A v, const Kept<A>& kept) {
    v = (v >= kept.least) & (v <= kept.most) ? v : std::numeric_limits<A>::quiet_NaN();
    low = min_of(low, v);
    high = max_of(high, v);
  }
  static __device__ __forceinline__ float min_of(float a, float b) { return fminf(a, b); }
  static __device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ double min_of(double a, double b) { return fmin(a, b); }
  static __device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }
  __device__ __forceinline__ bool seen() const { return low <= high; }
};

template <typename A>
struct Target {
  RangeUse use;
  int quant_min, quant_max;
  bool symmetric;
  double momentum;
  Activation<A> activation;
  A *low, *high, *scale, *zero_point;

  __device__ __forceinline__ void parameters(int64_t c, A lowest, A highest) const {
    const Grid<A> grid = range_to_grid(lowest, highest, quant_min, quant_max, symmetric);
    scale[c] = grid.scale;
    zero_point[c] = grid.zero_point;
  }
  __device__ __forceinline__ void finish(int64_t c, A lowest, A highest) const {
    const bool seen = lowest <= highest;
    if (seen) {
      // Adding 0 turns -0 into +0.
      lowest = clamp(lowest, activation.low, activation.high) + A(0);
      highest = clamp(highest, activation.low, activation.high) + A(0);
    }
    if (use == RangeUse::kParameters) return parameters(c, lowest, highest);
    if (use != RangeUse::kStore) {
      const A before_low = low[c], before_high = high[c];
      const bool first = before_low > before_high;
      lowest = moved_bound(before_low, lowest, momentum, first, seen);
      highest = moved_bound(before_high, highest, momentum, first, seen);
      if (use == RangeUse::kDelayed) {
        parameters(c, before_low, before_high);
      } else {
        parameters(c, lowest, highest);
      }
    }
    low[c] = lowest;
    high[c] = highest;
  }
};

// Nothing but the range.
template <typename T>
struct Watch {
  using In = T;
  using Ready = char;
  static constexpr bool kMask = false;
  const T* x;
};

template <typename Op>
constexpr bool kQuantizes = Op::kMask;

template <bool kOne>
constexpr int kRangeThreads = kOne ? kThreads : 128;

// Channels that a block can touch: at least the elements of one pack per thread.
template <typename Op, typename A, int V>
constexpr int kRangeSlots = kQuantizes<Op> ? 128 * V + 1 : 8192 / sizeof(A);

// Packs that a thread loads before it uses the first.
template <typename Op>
constexpr int kAhead = kQuantizes<Op> ? 2 : 4;

// A block takes `packs` packs per thread. kOne: there is one channel.
// Four blocks to a multiprocessor: 64 registers for 256 threads. Without the number the compiler, which then aims at 40
// for sm_100, spills around the division at the end.
template <typename Op, bool kOne, int V, typename A>
__global__ void __launch_bounds__(kRangeThreads<kOne>, 4)
    range_kernel(const Op op, const Shape shape, int packs, const Kept<A> kept, const Target<A> target,
                 RangeScratch scratch) {
  using In = typename Op::In;
  using Bits = typename Ordered<A>::Bits;
  constexpr int kBlock = kRangeThreads<kOne>, kSlots = kOne ? 1 : kRangeSlots<Op, A, V>;
  constexpr int kTable = kOne || !kQuantizes<Op> ? 1 : kSlots;
  // Ranges [2, slots] as the largest of -x and of x.
  __shared__ Bits found[2][kSlots];
  __shared__ typename Op::Ready table[kTable];
  __shared__ bool is_last;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock * packs * V;
  const int64_t limit = start + static_cast<int64_t>(kBlock) * packs * V;
  const int64_t end = limit < shape.numel ? limit : shape.numel;
  const Window window(shape, start, end > start ? end : start + 1);
  const int slots = kOne ? 1 : window.slots;
  typename Op::Ready ready{};
  if constexpr (kOne && kQuantizes<Op>) ready = op.ready(0);
  for (int slot = threadIdx.x; slot < slots; slot += kBlock) {
    found[0][slot] = found[1][slot] = 0;
    if constexpr (!kOne && kQuantizes<Op>) table[slot] = op.ready(window.channel(shape, slot));
  }
  __syncthreads();

  Range<A> range;
  range.clear();
  int current = 0;
  const auto flush = [&](int slot) {
    if (range.seen()) {
      atomicMax(&found[0][slot], Ordered<A>::of(-range.low));
      atomicMax(&found[1][slot], Ordered<A>::of(range.high));
    }
    range.clear();
  };
  for (int k = 0; k < packs; k += kAhead<Op>) {
    Pack<In, V> values[kAhead<Op>];
#pragma unroll
    for (int j = 0; j < kAhead<Op>; ++j) {
      const int64_t at = start + (static_cast<int64_t>(k + j) * kBlock + threadIdx.x) * V;
      if (at < end) values[j] = load_some<V>(op.x + at, end - at);
    }
#pragma unroll
    for (int j = 0; j < kAhead<Op>; ++j) {
      const int64_t at = start + (static_cast<int64_t>(k + j) * kBlock + threadIdx.x) * V, left = end - at;
      unsigned bits = 0;
      Pack<In, V> result;
      if (left > 0) {
        int slot = 0, rest = 0;
        if constexpr (!kOne) {
          slot = window.slot(shape, at, rest);
          if (slot != current) flush(current);
          current = slot;
          if constexpr (kQuantizes<Op>) ready = table[slot];
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (v < left) range.extend(A(widen(values[j].at[v])), kept);
          if constexpr (kQuantizes<Op>) {
            bool inside = false;
            result.at[v] = op.value(values[j].at[v], values[j].at[v], ready, inside);
            bits |= static_cast<unsigned>(inside) << v;
          }
          if constexpr (!kOne) {
            if (v + 1 < V && v + 1 < left) {
              window.advance(shape, slot, rest);
              if (slot != current) {
                flush(current);
                current = slot;
                if constexpr (kQuantizes<Op>) ready = table[slot];
              }
            }
          }
        }
        if constexpr (kQuantizes<Op>) store_some(op.out + at, result, left);
        if (left < V) bits &= (1u << left) - 1;
      }
      if constexpr (kQuantizes<Op>) {
        bits = gather_byte<V>(bits);
        if (left > 0 && threadIdx.x % (8 / V) == 0) op.mask[at / 8] = static_cast<uint8_t>(bits);
      }
    }
  }
  // Lanes that ended in one channel flush together.
  if (kOne || __all_sync(kFullWarp, current == __shfl_sync(kFullWarp, current, 0))) {
    for (int offset = 16; offset > 0; offset /= 2) {
      range.low = Range<A>::min_of(range.low, __shfl_xor_sync(kFullWarp, range.low, offset));
      range.high = Range<A>::max_of(range.high, __shfl_xor_sync(kFullWarp, range.high, offset));
    }
    if (threadIdx.x % 32 != 0) range.clear();
  }
  flush(current);
  __syncthreads();

  uint32_t* words = scratch.reserved < 0 ? scratch.words : pool + scratch.reserved;
  Bits* const ranges = reinterpret_cast<Bits*>(words + kHeader);
  const int64_t channels = shape.channels.divisor;
  for (int slot = threadIdx.x; slot < slots; slot += kBlock) {
    if (found[1][slot] == 0) continue;
    const int64_t c = kOne ? 0 : window.channel(shape, slot);
    atomicMax(ranges + c, found[0][slot]);
    atomicMax(ranges + channels + c, found[1][slot]);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(words, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int64_t c = threadIdx.x; c < channels; c += kBlock) {
    const Bits low = atomicExch(ranges + c, Bits(0)), high = atomicExch(ranges + channels + c, Bits(0));
    constexpr A inf = std::numeric_limits<A>::infinity();
    target.finish(c, low == 0 ? inf : -Ordered<A>::value(low), high == 0 ? -inf : Ordered<A>::value(high));
  }
  if (threadIdx.x == 0) words[0] = 0;
}

template <typename A>
Target<A> target_of(const RangeTarget& target, const Activation<A>& activation) {
  return {target.use,
          static_cast<int>(target.codes.quant_min),
          static_cast<int>(target.codes.quant_max),
          target.codes.symmetric,
          target.momentum,
          activation,
          static_cast<A*>(target.low),
          static_cast<A*>(target.high),
          static_cast<A*>(target.scale),
          static_cast<A*>(target.zero_point)};
}

template <typename A, typename Op>
void collect(const Op& op, bool wide, const Extent& extent, const Activation<A>& activation, const RangeTarget& target,
             const RangeScratch& scratch, cudaStream_t stream) {
  const Shape shape(extent);
  const auto run = [&](auto one, auto width) {
    constexpr bool kOne = decltype(one)::value;
    constexpr int V = decltype(width)::value, kBlock = kRangeThreads<kOne>;
    const int64_t step = int64_t(kBlock) * V;
    // Enough blocks for the device first, then few meetings in memory. In memory order, so that the end of x is what is
    // left in the cache.
    int64_t packs = std::clamp<int64_t>(extent.numel / (step * 1024), 1, 8);
    if constexpr (!kOne) {
      constexpr int64_t kSlots = kRangeSlots<Op, A, V>;
      if (extent.channels > kSlots)
        while (packs > 1 && runs_touched(packs * step, shape.inner.divisor) > kSlots) packs /= 2;
    }
    const int64_t blocks = std::max<int64_t>(blocks_of(extent.numel, packs * step), 1);
    launch(range_kernel<Op, kOne, V, A>, blocks, kBlock, stream, op, shape, static_cast<int>(packs),
           Kept<A>(activation), target_of(target, activation), scratch);
  };
  constexpr int V = kWide<typename Op::In>;
  if (!wide) return run(std::false_type{}, std::integral_constant<int, 1>{});
  if (extent.channels == 1) return run(std::true_type{}, std::integral_constant<int, V>{});
  run(std::false_type{}, std::integral_constant<int, V>{});
}

}  // namespace

int64_t range_words(Element element, int64_t channels) {
  return kHeader + 2 * channels * (element == Element::kDouble ? 2 : 1);
}

int64_t reserve_range_words(int device, cudaStream_t stream, int64_t words) {
  static WordPool reserved(kPool);
  return reserved.reserve(device, stream, words);
}

void launch_range(Element element, const void* x, const Extent& extent, ActivationKind activation,
                  const RangeTarget& target, const RangeScratch& scratch, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Watch<T> op{static_cast<const T*>(x)};
    collect(op, aligned(x), extent, activation_of<A>(activation), target, scratch, stream);
  });
}

void launch_delayed(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                    ActivationKind activation, Rule rule, const RangeTarget& target, const RangeScratch& scratch,
                    cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Activation<A> bounds = activation_of<A>(activation);
    // The last block writes scales and zero points, once every block has read the range.
    const RangeParameters<A> source{static_cast<const A*>(target.low),
                                    static_cast<const A*>(target.high),
                                    nullptr,
                                    nullptr,
                                    static_cast<int>(target.codes.quant_min),
                                    static_cast<int>(target.codes.quant_max),
                                    target.codes.symmetric};
    const MaskedForward<T, A, RangeParameters<A>> op{
        static_cast<const T*>(x), nullptr, static_cast<T*>(y), mask, source, bounds, to_pass(bounds, rule), rule};
    collect(op, aligned(x) && aligned(y), extent, bounds, target, scratch, stream);
  });
}

}  // namespace clusterq
