// What the kernels of the BatchNorm statistics share: their task, sums of neighbouring lanes, eval-mode BatchNorm.
#pragma once

#include "bn_stats.h"
#include "device.h"

namespace clusterq {
namespace {

constexpr int kWarps = kStatisticsThreads / 32;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

template <typename A>
__device__ __forceinline__ bool is_finite(A v) {
  return v - v == A(0);
}

// 1 / sqrt(v) within one unit in the last place.
__device__ __forceinline__ float inverse_root(float v) {
  const float r = rsqrtf(v), rest = multiply_add(-v * r, r, 1.0f);
  // At 0 and infinity nothing is left to correct.
  return is_finite(rest) ? multiply_add(0.5f * r, rest, r) : r;
}
__device__ __forceinline__ double inverse_root(double v) { return rsqrt(v); }

// Sum over `lanes` neighbours, a power of two: the same bits in all of them. For whole warps.
template <typename A>
__device__ __forceinline__ A lane_sum(A v, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Sum over the block in a fixed order, for every thread; `room` is free before the call and after the next barrier.
__device__ __forceinline__ double block_total(double v, double* room) {
  v = lane_sum(v, 32);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += room[w];
  return sum;
}

// Columns of a block whose threads have V neighbouring ones each, `lanes` threads to a row: see most_lanes.
template <int V>
constexpr int kMostColumns = V * most_lanes(V);

// Adds up V values over the rows of a warp and leaves them to be added over the warps.
template <int V, typename A>
__device__ __forceinline__ void leave_sums(A (&values)[V], int lanes, A* room) {
#pragma unroll
  for (int v = 0; v < V; ++v)
    for (int offset = 16; offset >= lanes; offset /= 2) values[v] += __shfl_xor_sync(kFullWarp, values[v], offset);
  const int lane = threadIdx.x % 32;
  if (lane >= lanes) return;
#pragma unroll
  for (int v = 0; v < V; ++v) room[lane * V + v] = values[v];
}

// y = (x - mean) * scale + bias of one channel.
template <typename A>
struct Affine {
  A mean, scale, bias;
  __device__ __forceinline__ A value(A x) const { return multiply_add(x - mean, scale, bias); }
};

template <typename A>
struct Norm {
  const A *weight, *bias, *mean, *var;
  A eps;

  __device__ __forceinline__ A scale(int64_t channel) const {
    const A inverse = inverse_root(var[channel] + eps);
    return weight == nullptr ? inverse : weight[channel] * inverse;
  }
  __device__ __forceinline__ Affine<A> at(int64_t channel) const {
    return {mean[channel], scale(channel), bias == nullptr ? A(0) : bias[channel]};
  }
};

template <typename A>
Norm<A> norm_of(const Normalization& norm) {
  return {static_cast<const A*>(norm.weight), static_cast<const A*>(norm.bias), static_cast<const A*>(norm.mean),
          static_cast<const A*>(norm.var), static_cast<A>(norm.eps)};
}

template <typename T, typename A>
struct Task {
  const T* x;
  T* y;
  int64_t images, channels, positions, part;
  uint32_t parts, tiles, slab, lanes;
  Divider by_channels;
  // 1 / positions.
  double inverse;
  // Where the moments of every segment go; without it, mean and variance of every image go to [images, stride].
  Moments* moments;
  A *mean, *var;
  int64_t stride;
  // 16-byte accesses to x, and to y, at the same places.
  bool wide, small;

  __device__ __forceinline__ void write(int64_t image, int64_t index, int64_t channel, const Moments& found) const {
    if (moments != nullptr) {
      moments[(image * parts + index) * channels + channel] = found;
    } else {
      mean[image * stride + channel] = static_cast<A>(found.mean);
      var[image * stride + channel] = static_cast<A>(found.squares * inverse);
    }
  }
};

template <typename T, typename A>
Task<T, A> task_of(const void* x, void* y, const Samples& samples, const StatisticsPlan& plan,
                   const StatisticsTarget& target) {
  Task<T, A> task{};
  task.x = static_cast<const T*>(x);
  task.y = static_cast<T*>(y);
  task.images = samples.images;
  task.channels = samples.channels;
  task.positions = samples.positions;
  task.part = plan.part;
  task.parts = static_cast<uint32_t>(plan.parts);
  task.tiles = static_cast<uint32_t>(plan.tiles);
  task.slab = static_cast<uint32_t>(plan.slab);
  task.lanes = static_cast<uint32_t>(plan.lanes);
  task.by_channels = Divider(samples.channels);
  task.small = samples.images * samples.channels < int64_t(1) << 31;
  task.inverse = 1.0 / static_cast<double>(samples.positions);
  task.moments = target.moments;
  task.mean = static_cast<A*>(target.mean);
  task.var = static_cast<A*>(target.var);
  task.stride = target.stride;
  // Parts of large planes look for the first aligned element themselves.
  const auto place = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16; };
  task.wide = plan.walk == Walk::kBlock ? y == nullptr || place(x) == place(y) : aligned(x) && aligned(y);
  return task;
}

}  // namespace
}  // namespace clusterq
