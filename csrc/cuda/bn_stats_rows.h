// Statistics of [images, positions, channels], one read of x: a thread has V neighbouring channels and every `height`th
// position. The mean of a chunk of positions, taken over the block, is the shift of its squares.
#pragma once

#include "bn_stats_device.h"

namespace clusterq {
namespace {

template <int V, typename A>
struct RowRoom {
  static constexpr int kColumns = kMostColumns<V>;
  A sums[3][kWarps][kColumns];
  A shift[kColumns];
  Affine<A> affine[kColumns];
};

// kHeld: rows that a thread loads before it uses the first.
template <bool kNorm, int V, int kHeld, typename T, typename A>
__device__ __forceinline__ void rows(const Task<T, A>& task, const Norm<A>& norm, unsigned block) {
  using Room = RowRoom<V, A>;
  static_assert(Room::kColumns <= kStatisticsThreads);
  __shared__ Room room;
  const int lanes = task.lanes, shift = __ffs(lanes) - 1, height = kStatisticsThreads >> shift;
  const int warp = threadIdx.x / 32, x_lane = threadIdx.x & (lanes - 1), y_lane = threadIdx.x >> shift;
  const unsigned segment = block / task.tiles, tile = block - segment * task.tiles;
  const unsigned image = segment / task.parts, index = segment - image * task.parts;
  const int64_t channels = task.channels, first_column = static_cast<int64_t>(tile) * lanes * V;
  const int64_t column = first_column + x_lane * V;
  const int64_t length = part_length(task.positions, task.part, index);
  const int64_t start = (static_cast<int64_t>(image) * task.positions + index * task.part) * channels;
  // One thread owns the moments of a column.
  const bool owner = static_cast<int>(threadIdx.x) < lanes * V && first_column + threadIdx.x < channels;
  if constexpr (kNorm)
    if (owner) room.affine[threadIdx.x] = norm.at(first_column + threadIdx.x);
  Moments own{0, 0};
  double count = 0;
  for (int64_t base = 0; base < length; base += height * kHeld) {
    const int64_t rest = length - base;
    const int here = rest < height * kHeld ? static_cast<int>(rest) : height * kHeld;
    const T* const from = task.x + start + base * channels + column;
    const int mine = column < channels ? here : 0;
    Pack<T, V> held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int row = y_lane + k * height;
      if (row < mine) held[k] = load_pack<V>(from + row * channels);
    }
    A sum[V] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (y_lane + k * height >= mine) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += A(widen(held[k].at[v]));
    }
    leave_sums<V>(sum, lanes, room.sums[0][warp]);
    __syncthreads();
    const A inverse = reciprocal(A(here));
    if (owner) {
      A all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += room.sums[0][w][threadIdx.x];
      room.shift[threadIdx.x] = all * inverse;
    }
    __syncthreads();
    A first[V] = {}, second[V] = {}, shift_by[V];
#pragma unroll
    for (int v = 0; v < V; ++v) shift_by[v] = room.shift[x_lane * V + v];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (y_lane + k * height >= mine) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A d = A(widen(held[k].at[v])) - shift_by[v];
        first[v] += d;
        second[v] = multiply_add(d, d, second[v]);
      }
    }
    leave_sums<V>(first, lanes, room.sums[1][warp]);
    leave_sums<V>(second, lanes, room.sums[2][warp]);
    if constexpr (kNorm) {
      Affine<A> affine[V];
#pragma unroll
      for (int v = 0; v < V; ++v) affine[v] = room.affine[x_lane * V + v];
      T* const to = task.y + start + base * channels + column;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int row = y_lane + k * height;
        if (row >= mine) continue;
        Pack<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.at[v] = Narrow<T>::of(affine[v].value(A(widen(held[k].at[v]))));
        store_pack(to + row * channels, result);
      }
    }
    __syncthreads();
    if (!owner) continue;
    A sum_first = 0, sum_second = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum_first += room.sums[1][w][threadIdx.x];
      sum_second += room.sums[2][w][threadIdx.x];
    }
    Moments found = shifted_moments(room.shift[threadIdx.x], sum_first, sum_second, inverse);
    if (sizeof(A) == 4 && !is_finite(sum_second)) {
      // Squares that overflow, or a NaN: the column again, in float64.
      const T* const again = task.x + start + base * channels + first_column + threadIdx.x;
      double wide_sum = 0, squares = 0;
      for (int row = 0; row < here; ++row) wide_sum += static_cast<double>(widen(again[row * channels]));
      const double mean = wide_sum * reciprocal(static_cast<double>(here));
      for (int row = 0; row < here; ++row) {
        const double d = static_cast<double>(widen(again[row * channels])) - mean;
        squares += d * d;
      }
      found = {mean, squares};
    }
    merge_moments(own, count, found, here * reciprocal(count + here));
    count += here;
  }
  if (owner) task.write(image, index, first_column + threadIdx.x, own);
}

}  // namespace
}  // namespace clusterq
