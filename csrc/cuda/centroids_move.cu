// The moving average of the centroids: clusterq/ops/centroids.py has the formulas. float64, rounded once where it is
// stored.
#include "centroids_device.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ double moved_size(const MovingAverage& p, int64_t b, int64_t k) {
  const float size = static_cast<const float*>(p.size.data)[b * p.size.stride[0] + k * p.size.stride[1]];
  const double count = p.sums[(b * p.clusters + k) * (p.dim + 1) + p.dim];
  return p.decay * static_cast<double>(size) + (1 - p.decay) * count;
}

// A block has one batch entry.
__global__ void __launch_bounds__(kThreads, 2) whole_kernel(const __grid_constant__ MovingAverage p) {
  double sum = 0, unused = 0;
  for (int64_t k = threadIdx.x; k < p.clusters; k += kThreads) sum += moved_size(p, blockIdx.x, k);
  block_sum(sum, unused);
  if (threadIdx.x == 0) p.whole[blockIdx.x] = sum;
}

// A warp has one centroid. S: of the running sums.
template <typename C, typename S>
__global__ void __launch_bounds__(kThreads, 2) move_kernel(const __grid_constant__ MovingAverage p) {
  const int lane = threadIdx.x % 32;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (at >= p.batch * p.clusters) return;
  const int64_t b = at / p.clusters, k = at - b * p.clusters;
  float& stored = static_cast<float*>(p.size.data)[b * p.size.stride[0] + k * p.size.stride[1]];
  const double* const sums = p.sums + at * (p.dim + 1);
  const double count = sums[p.dim], old_size = stored, size = moved_size(p, b, k), rest = 1 - p.decay;
  double divisor = size;
  bool used = count != 0;
  if (p.mode == MoveMode::kRunning) {
    if (p.smoothing > 0) {
      const double whole = p.whole[b];
      divisor = (size + p.smoothing) / (whole + static_cast<double>(p.clusters) * p.smoothing) * whole;
    }
    used = divisor != 0;
  } else if (p.mode == MoveMode::kCodebook) {
    // An entry of size 0 stays 0 / 0 under decay 1.
    used = used && size != 0;
  }
  C* const centroid = static_cast<C*>(p.centroids.data) + b * p.centroids.stride[0] + k * p.centroids.stride[1];
  S* const running = static_cast<S*>(p.running.data) + b * p.running.stride[0] + k * p.running.stride[1];
  for (int64_t d = lane; d < p.dim; d += 32) {
    C& value = centroid[d * p.centroids.stride[2]];
    const double old = widen(value), total = sums[d];
    double moved;
    if (p.mode == MoveMode::kRunning) {
      S& sum = running[d * p.running.stride[2]];
      const double next = p.decay * static_cast<double>(sum) + rest * total;
      sum = from_double<S>(next);
      moved = next / divisor;
    } else if (p.mode == MoveMode::kMean) {
      moved = p.decay * old + rest * (total / count);
    } else {
      moved = (p.decay * old_size * old + rest * total) / size;
    }
    if (used) value = from_double<C>(moved);
  }
  // All lanes have read the old one.
  __syncwarp();
  if (lane == 0) stored = from_double<float>(size);
}

}  // namespace

void launch_move(const MovingAverage& move, cudaStream_t stream) {
  if (move.mode == MoveMode::kRunning && move.smoothing > 0) launch(whole_kernel, move.batch, kThreads, stream, move);
  const int64_t blocks = blocks_of(move.batch * move.clusters, kWarps);
  for_element(move.element,
              [&](auto c, auto s) { launch(move_kernel<decltype(c), decltype(s)>, blocks, kThreads, stream, move); });
}

}  // namespace clusterq
