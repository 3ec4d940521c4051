// Statistics of [images, channels, positions], one read of x. The sum of a plane comes first; a mean rounded to the
// arithmetic type is the shift of everything that follows, as the data are still in registers or in shared memory.
#pragma once

#include "bn_stats_device.h"

namespace clusterq {
namespace {

// 32 elements; a pack of double holds few.
template <typename T>
constexpr int kPlanePacks = 32 / kWide<T>;

// Moments of `count` elements whose squares overflow the arithmetic type, or that hold a NaN: read again. For whole
// warps, whose groups of `lanes` have a plane each.
template <typename T>
__device__ __forceinline__ Moments wide_moments(const T* from, int count, double inverse, int lane, int lanes) {
  double sum = 0, squares = 0;
  for (int i = lane; i < count; i += lanes) sum += static_cast<double>(widen(from[i]));
  const double mean = lane_sum(sum, lanes) * inverse;
  for (int i = lane; i < count; i += lanes) {
    const double d = static_cast<double>(widen(from[i])) - mean;
    squares += d * d;
  }
  return {mean, lane_sum(squares, lanes)};
}

// A group of lanes holds one plane in registers.
template <bool kNorm, typename T, typename A>
__device__ __forceinline__ void packed_planes(const Task<T, A>& task, const Norm<A>& norm, int64_t block) {
  constexpr int V = kWide<T>, kPacks = kPlanePacks<T>;
  const int lanes = task.lanes, lane = threadIdx.x & (lanes - 1), shift = __ffs(lanes) - 1;
  const int64_t plane = block * (kStatisticsThreads >> shift) + (threadIdx.x >> shift);
  const bool inside = plane < task.images * task.channels;
  const int packs = inside ? static_cast<int>(task.positions) / V : 0;
  const T* const from = task.x + plane * task.positions;
  Pack<T, V> held[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (lane + k * lanes < packs) held[k] = load_pack<V>(from + (lane + k * lanes) * V);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (lane + k * lanes >= packs) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += A(widen(held[k].at[v]));
  }
  const A shift_by = lane_sum(sum, lanes) * static_cast<A>(task.inverse);
  A first = 0, second = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (lane + k * lanes >= packs) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A d = A(widen(held[k].at[v])) - shift_by;
      first += d;
      second = multiply_add(d, d, second);
    }
  }
  first = lane_sum(first, lanes);
  second = lane_sum(second, lanes);
  Moments found = shifted_moments(shift_by, first, second, task.inverse);
  if constexpr (sizeof(A) == 4) {
    if (!__all_sync(kFullWarp, is_finite(second))) {
      const Moments again = wide_moments(from, packs * V, task.inverse, lane, lanes);
      if (!is_finite(second)) found = again;
    }
  }
  if (!inside) return;
  const int64_t image = task.by_channels.quotient(plane, task.small), channel = plane - image * task.channels;
  if (lane == 0) task.write(image, 0, channel, found);
  if constexpr (kNorm) {
    const Affine<A> affine = norm.at(channel);
    T* const to = task.y + plane * task.positions;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (lane + k * lanes >= packs) continue;
      Pack<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = Narrow<T>::of(affine.value(A(widen(held[k].at[v]))));
      store_pack(to + (lane + k * lanes) * V, result);
    }
  }
}

// Planes of any length and place: a slab of them comes through shared memory, so that accesses to x and y are whole
// packs. A slab is at most kSlab elements, or a plane or more per group of lanes.
template <typename T>
constexpr int kSlabRoom = kSmallPlane * (kWide<T> > kWarps ? kWide<T> : kWarps);

template <bool kNorm, typename T, typename A>
__device__ __forceinline__ void slab_planes(const Task<T, A>& task, const Norm<A>& norm, int64_t block) {
  constexpr int V = kWide<T>, kAhead = 4;
  alignas(16) __shared__ T slab[kSlabRoom<T>];
  const int positions = static_cast<int>(task.positions);
  const int64_t first_plane = block * task.slab, left = task.images * task.channels - first_plane;
  const int planes = left < task.slab ? static_cast<int>(left) : static_cast<int>(task.slab);
  const int elements = planes * positions;
  const T* const from = task.x + first_plane * positions;
  if (task.wide) {
    for (int start = threadIdx.x * V; start < elements; start += kAhead * kStatisticsThreads * V) {
      Pack<T, V> held[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = start + k * kStatisticsThreads * V;
        if (at < elements) held[k] = load_some<V>(from + at, elements - at);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = start + k * kStatisticsThreads * V;
        if (at < elements) *reinterpret_cast<Pack<T, V>*>(slab + at) = held[k];
      }
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < elements; i += kStatisticsThreads) slab[i] = from[i];
  }
  __syncthreads();
  const int lanes = task.lanes, lane = threadIdx.x & (lanes - 1), shift = __ffs(lanes) - 1;
  const int groups = kStatisticsThreads >> shift;
  for (int start = 0; start < planes; start += groups) {
    const int own = start + (threadIdx.x >> shift);
    const bool inside = own < planes;
    const int count = inside ? positions : 0;
    T* const plane = slab + own * positions;
    A sum = 0;
#pragma unroll 4
    for (int i = lane; i < count; i += lanes) sum += A(widen(plane[i]));
    const A shift_by = lane_sum(sum, lanes) * static_cast<A>(task.inverse);
    A first = 0, second = 0;
#pragma unroll 4
    for (int i = lane; i < count; i += lanes) {
      const A d = A(widen(plane[i])) - shift_by;
      first += d;
      second = multiply_add(d, d, second);
    }
    first = lane_sum(first, lanes);
    second = lane_sum(second, lanes);
    Moments found = shifted_moments(shift_by, first, second, task.inverse);
    if constexpr (sizeof(A) == 4) {
      if (!__all_sync(kFullWarp, is_finite(second))) {
        const Moments again = wide_moments(plane, count, task.inverse, lane, lanes);
        if (!is_finite(second)) found = again;
      }
    }
    if (!inside) continue;
    const int64_t index = first_plane + own;
    const int64_t image = task.by_channels.quotient(index, task.small), channel = index - image * task.channels;
    if (lane == 0) task.write(image, 0, channel, found);
    if constexpr (kNorm) {
      const Affine<A> affine = norm.at(channel);
#pragma unroll 4
      for (int i = lane; i < count; i += lanes) plane[i] = Narrow<T>::of(affine.value(A(widen(plane[i]))));
    }
  }
  if constexpr (kNorm) {
    __syncthreads();
    T* const to = task.y + first_plane * positions;
    if (task.wide) {
      for (int at = threadIdx.x * V; at < elements; at += kStatisticsThreads * V)
        store_some(to + at, *reinterpret_cast<const Pack<T, V>*>(slab + at), elements - at);
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < elements; i += kStatisticsThreads) to[i] = slab[i];
    }
  }
}

// A block takes one part of a large plane. Every thread has a chunk of its own: its mean, then its squares; chunks are
// merged in float64.
template <bool kNorm, typename T, typename A>
__device__ __forceinline__ void large_plane(const Task<T, A>& task, const Norm<A>& norm, int64_t block) {
  constexpr int V = kWide<T>, kPacks = kPlanePacks<T> < 8 ? kPlanePacks<T> : 8;
  __shared__ double room[2][kWarps];
  const int64_t plane = task.parts == 1 ? block : static_cast<unsigned>(block) / task.parts;
  const int64_t index = block - plane * task.parts;
  const int64_t image = task.by_channels.quotient(plane, task.small), channel = plane - image * task.channels;
  const int64_t start = plane * task.positions + index * task.part;
  const int64_t length = part_length(task.positions, task.part, index);
  const T* const from = task.x + start;
  T* const to = kNorm ? task.y + start : nullptr;
  // Elements before the first pack, and after the last one: one for each of the first threads.
  const int head = static_cast<int>((16 - reinterpret_cast<uintptr_t>(from) % 16) % 16 / sizeof(T));
  const int64_t packs = (length - head) / V, body = head + packs * V;
  const int64_t lone = static_cast<int>(threadIdx.x) < head ? threadIdx.x : body + threadIdx.x - head;
  Affine<A> affine{};
  if constexpr (kNorm) affine = norm.at(channel);
  double count = 0;
  Moments own{0, 0};
  int64_t base = 0;
  do {
    const T* const chunk = from + head + (base + threadIdx.x) * V;
    const int64_t left = packs - base - threadIdx.x;
    Pack<T, V> held[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (k * kStatisticsThreads < left) held[k] = load_pack<V>(chunk + k * kStatisticsThreads * V);
    const bool has_lone = base == 0 && lone < length;
    base += kPacks * kStatisticsThreads;
    const A extra = has_lone ? A(widen(from[lone])) : A(0);
    A sum = extra;
    int elements = has_lone;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * kStatisticsThreads >= left) continue;
      elements += V;
#pragma unroll
      for (int v = 0; v < V; ++v) sum += A(widen(held[k].at[v]));
    }
    if (elements == 0) continue;
    const A inverse = reciprocal(A(elements)), shift_by = sum * inverse;
    A first = has_lone ? extra - shift_by : A(0);
    A second = first * first;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * kStatisticsThreads >= left) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A d = A(widen(held[k].at[v])) - shift_by;
        first += d;
        second = multiply_add(d, d, second);
      }
    }
    if constexpr (kNorm) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (k * kStatisticsThreads >= left) continue;
        Pack<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.at[v] = Narrow<T>::of(affine.value(A(widen(held[k].at[v]))));
        T* const place = to + (chunk - from) + k * kStatisticsThreads * V;
        if (task.wide) {
          store_pack(place, result);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) place[v] = result.at[v];
        }
      }
      if (has_lone) to[lone] = Narrow<T>::of(affine.value(extra));
    }
    Moments found = shifted_moments(shift_by, first, second, inverse);
    if (sizeof(A) == 4 && !is_finite(second)) {
      double wide_sum = extra, wide_squares = 0;
      const auto each = [&](const auto& take) {
        for (int k = 0; k < kPacks && k * kStatisticsThreads < left; ++k)
          for (int v = 0; v < V; ++v) take(static_cast<double>(widen(chunk[k * kStatisticsThreads * V + v])));
      };
      each([&](double x) { wide_sum += x; });
      const double mean = wide_sum / elements;
      if (has_lone) wide_squares = (extra - mean) * (extra - mean);
      each([&](double x) { wide_squares += (x - mean) * (x - mean); });
      found = {mean, wide_squares};
    }
    if (count > 0) {
      merge_moments(own, count, found, elements * reciprocal(count + elements));
    } else {
      own = found;
    }
    count += elements;
  } while (base < packs);
  // Over the block: the mean first, then the squares about it.
  const double mean = block_total(own.mean * count, room[0]) * reciprocal(static_cast<double>(length));
  const double d = own.mean - mean;
  const double squares = block_total(count > 0 ? own.squares + count * d * d : 0, room[1]);
  if (threadIdx.x == 0) task.write(image, index, channel, {mean, squares});
}

}  // namespace
}  // namespace clusterq
