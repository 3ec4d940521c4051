// Sums over the rows of every centroid, in float64 and in an order that depends on the sizes alone: a counting sort by
// centroid, stable and without atomics on floats, then a warp for each segment of a centroid's rows, then the segments
// in turn. Also the gradient of the distances, which is such a sum.
#include "centroids_device.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename X, typename C>
struct SumsTask {
  using A = std::conditional_t<std::is_same_v<X, double>, double, float>;
  Rows<X> x;
  int64_t clusters;
  const int64_t* index;
  const A* weights;
  // Of the gradient: see SegmentSums.
  const C* centroids;
  SumsPlan plan;
  int32_t *counts, *starts, *segments, *order;
  double* partial;
  void* result;

  // The centroid of a row, -1 where it is left out.
  template <bool kFlow>
  __device__ __forceinline__ int64_t centroid_of(int64_t at) const {
    const int64_t k = index[at];
    bool used = k >= 0 && k < clusters;
    if constexpr (!kFlow) used = used && (weights == nullptr || weights[at] != A(0));
    return used ? k : -1;
  }
  template <bool kFlow>
  __device__ __forceinline__ double weight_of(int64_t at) const {
    if constexpr (kFlow) return 2 * static_cast<double>(weights[at]);
    return weights == nullptr ? 1.0 : static_cast<double>(weights[at]);
  }
};

template <bool kFlow, typename X, typename C>
__global__ void __launch_bounds__(kThreads, 3) count_kernel(const __grid_constant__ SumsTask<X, C> t) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= t.x.batch * t.x.rows) return;
  const int64_t b = at / t.x.rows, tile = (at - b * t.x.rows) / t.plan.tile, k = t.template centroid_of<kFlow>(at);
  // Whole numbers: their sum has no order.
  if (k >= 0) atomicAdd(t.counts + (b * t.plan.tiles + tile) * t.clusters + k, 1);
}

// Counts of a tile become the places of its rows among those of the centroid; the whole count goes to `starts`.
__global__ void __launch_bounds__(kThreads, 3)
    tiles_kernel(int32_t* counts, int32_t* starts, int64_t batch, int64_t tiles, int64_t clusters) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= batch * clusters) return;
  const int64_t b = at / clusters, k = at - b * clusters;
  int32_t* const own = counts + b * tiles * clusters + k;
  int32_t sum = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int32_t count = own[tile * clusters];
    own[tile * clusters] = sum;
    sum += count;
  }
  starts[b * (clusters + 1) + k] = sum;
}

// Rows of a centroid in the lower half, its segments in the upper: they are summed together.
__device__ __forceinline__ uint64_t rows_and_segments(int32_t count) {
  return static_cast<uint64_t>(count) | static_cast<uint64_t>(blocks_of(count, kSegmentRows)) << 32;
}

// Sum over the threads before this one, and of all.
__device__ __forceinline__ uint64_t scan(uint64_t value, uint64_t* room, uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t before = __shfl_sync(kFullWarp, sum, lane >= offset ? lane - offset : lane);
    if (lane >= offset) sum += before;
  }
  __syncthreads();
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? room[w] : 0;
    total += room[w];
  }
  return before + sum - value;
}

// A block has one batch entry, a thread eight centroids at a step: whole counts become the first place of every
// centroid and its first segment.
__global__ void __launch_bounds__(kThreads, 3) starts_kernel(int32_t* starts, int32_t* segments, int64_t clusters) {
  constexpr int kEach = 8;
  __shared__ uint64_t room[kWarps];
  int32_t* const own = starts + blockIdx.x * (clusters + 1);
  int32_t* const own_segments = segments + blockIdx.x * (clusters + 1);
  uint64_t before = 0;
  for (int64_t base = 0; base <= clusters; base += kThreads * kEach) {
    const int64_t first = base + threadIdx.x * kEach;
    uint64_t sums[kEach], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sums[i] = rows_and_segments(first + i < clusters ? own[first + i] : 0);
      sum += sums[i];
    }
    uint64_t place = before + scan(sum, room, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i <= clusters) {
        own[first + i] = static_cast<int32_t>(place);
        own_segments[first + i] = static_cast<int32_t>(place >> 32);
      }
      place += sums[i];
    }
    before += total;
  }
}

// A warp walks through a tile, 32 rows at a step, and writes each to its place: rows of a centroid keep their order.
template <bool kFlow, typename X, typename C>
__global__ void __launch_bounds__(kThreads, 3) order_kernel(const __grid_constant__ SumsTask<X, C> t) {
  const int lane = threadIdx.x % 32;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (at >= t.x.batch * t.plan.tiles) return;
  const int64_t b = at / t.plan.tiles, first = (at - b * t.plan.tiles) * t.plan.tile;
  const int64_t end = first + t.plan.tile < t.x.rows ? first + t.plan.tile : t.x.rows;
  int32_t* const places = t.counts + at * t.clusters;
  const int32_t* const starts = t.starts + b * (t.clusters + 1);
  int32_t* const order = t.order + b * t.x.rows;
  const auto at_row = [&](int64_t row) {
    return row < end ? t.template centroid_of<kFlow>(b * t.x.rows + row) : int64_t(-1);
  };
  int64_t next = at_row(first + lane);
  for (int64_t base = first; base < end; base += 32) {
    const int64_t row = base + lane, k = next;
    next = at_row(row + 32);
    const unsigned same = __match_any_sync(kFullWarp, static_cast<int>(k));
    const int32_t place = k < 0 ? 0 : places[k];
    // All have read before one writes, and the next step reads what was written.
    __syncwarp();
    if (k >= 0) {
      order[starts[k] + place + __popc(same & ((1u << lane) - 1))] = static_cast<int32_t>(row);
      if (lane == __ffs(static_cast<int>(same)) - 1) places[k] = place + __popc(same);
    }
    __syncwarp();
  }
}

// How a warp reads rows: V neighbours to a lane, `lanes` lanes to a row, 32 / lanes rows at once, `slices` warps to a
// row. The order of a sum follows from D and the type.
struct Slices {
  int lanes;
  int64_t slices;
};

template <int V>
Slices slices_of(int64_t dim) {
  const int64_t packs = blocks_of(dim, V);
  int lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  return {lanes, blocks_of(packs, lanes)};
}

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_values(const T* from, int64_t left, bool wide) {
  if (wide && left >= V) return load_pack<V>(from);
  Pack<T, V> pack{};
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < left) pack.at[v] = from[v];
  return pack;
}

// A warp adds one slice of the rows of one segment.
template <bool kFlow, int V, typename X, typename C>
__global__ void __launch_bounds__(kThreads, 2)
    segment_kernel(const __grid_constant__ SumsTask<X, C> t, const __grid_constant__ Slices slices) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  const int64_t segment_at = at / slices.slices, slice = at - segment_at * slices.slices;
  if (segment_at >= t.x.batch * t.plan.segments) return;
  const int64_t b = segment_at / t.plan.segments, segment = segment_at - b * t.plan.segments;
  const int32_t *const segments = t.segments + b * (t.clusters + 1), *const starts = t.starts + b * (t.clusters + 1);
  if (segment >= segments[t.clusters]) return;
  // Last centroid that begins at this segment or before: those before it in a tie have no segments.
  int64_t low = 0, high = t.clusters;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (segments[middle] <= segment) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t k = low, dim = t.x.dim;
  const int64_t begin = starts[k] + (segment - segments[k]) * kSegmentRows;
  const int64_t end = begin + kSegmentRows < starts[k + 1] ? begin + kSegmentRows : starts[k + 1];
  const int32_t* const order = t.order + b * t.x.rows;
  const int lane = threadIdx.x % 32, groups = 32 / slices.lanes, group = lane / slices.lanes;
  const int64_t d = (slice * slices.lanes + lane % slices.lanes) * V, left = dim - d;
  double sums[V] = {}, weights = 0, centroid[V] = {};
  if constexpr (kFlow) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < left) centroid[v] = widen(t.centroids[(b * t.clusters + k) * dim + d + v]);
  }
#pragma unroll 4
  for (int64_t i = begin + group; i < end; i += groups) {
    const int64_t row = order[i];
    const double weight = t.template weight_of<kFlow>(b * t.x.rows + row);
    weights += weight;
    if (left <= 0) continue;
    const Pack<X, V> values = load_values<V>(t.x.at(b, row) + d, left, t.x.wide);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += weight * (static_cast<double>(widen(values.at[v])) - centroid[v]);
  }
  for (int bits = slices.lanes; bits < 32; bits *= 2) {
    weights += __shfl_xor_sync(kFullWarp, weights, bits);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += __shfl_xor_sync(kFullWarp, sums[v], bits);
  }
  double* const to = t.partial + (b * t.plan.segments + segment) * (dim + 1);
  if (group == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < left) to[d + v] = sums[v];
  }
  if (slice == 0 && lane == 0) to[dim] = weights;
}

// Adds the segments of every centroid; a thread has one column.
template <bool kFlow, typename R>
__global__ void __launch_bounds__(kThreads, 3)
    merge_kernel(const int32_t* segments, const double* partial, void* result, int64_t batch, int64_t clusters,
                 int64_t dim, int64_t most) {
  const int64_t columns = kFlow ? dim : dim + 1;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= batch * clusters * columns) return;
  const int64_t own = at / columns, column = at - own * columns, b = own / clusters, k = own - b * clusters;
  const int32_t* const first = segments + b * (clusters + 1) + k;
  const double* const from = partial + b * most * (dim + 1) + column;
  double sum = 0;
#pragma unroll 8
  for (int64_t segment = first[0]; segment < first[1]; ++segment) sum += from[segment * (dim + 1)];
  if constexpr (kFlow) {
    // Adding 0 makes the gradient of an empty one +0.
    static_cast<R*>(result)[at] = from_double<R>(-sum + 0.0);
  } else {
    static_cast<R*>(result)[at] = sum;
  }
}

template <typename X, typename C>
SumsTask<X, C> task_of(const SegmentSums& sums) {
  using A = typename SumsTask<X, C>::A;
  return {Rows<X>(sums.x),
          sums.clusters,
          sums.index,
          static_cast<const A*>(sums.weights),
          static_cast<const C*>(sums.centroids),
          sums.plan,
          sums.counts,
          sums.starts,
          sums.segments,
          sums.order,
          sums.partial,
          sums.result};
}

template <bool kFlow, typename X, typename C>
void run(const SegmentSums& sums, cudaStream_t stream) {
  const SumsTask<X, C> task = task_of<X, C>(sums);
  const int64_t batch = sums.x.batch, rows = sums.x.rows, dim = sums.x.dim, clusters = sums.clusters;
  if (rows > 0) launch(count_kernel<kFlow, X, C>, blocks_of(batch * rows, kThreads), kThreads, stream, task);
  launch(tiles_kernel, blocks_of(batch * clusters, kThreads), kThreads, stream, sums.counts, sums.starts, batch,
         sums.plan.tiles, clusters);
  launch(starts_kernel, batch, kThreads, stream, sums.starts, sums.segments, clusters);
  if (rows > 0) {
    launch(order_kernel<kFlow, X, C>, blocks_of(batch * sums.plan.tiles, kWarps), kThreads, stream, task);
    const int64_t segments = batch * sums.plan.segments;
    // 16 bytes to a lane where rows are whole packs: a matter of the sizes, wherever they lie in memory.
    if (dim % kWide<X> == 0) {
      const Slices slices = slices_of<kWide<X>>(dim);
      launch(segment_kernel<kFlow, kWide<X>, X, C>, blocks_of(segments * slices.slices, kWarps), kThreads, stream, task,
             slices);
    } else {
      const Slices slices = slices_of<1>(dim);
      launch(segment_kernel<kFlow, 1, X, C>, blocks_of(segments * slices.slices, kWarps), kThreads, stream, task,
             slices);
    }
  }
}

template <bool kFlow, typename R>
void merge(const SegmentSums& sums, cudaStream_t stream) {
  const int64_t dim = sums.x.dim, columns = kFlow ? dim : dim + 1;
  launch(merge_kernel<kFlow, R>, blocks_of(sums.x.batch * sums.clusters * columns, kThreads), kThreads, stream,
         sums.segments, sums.partial, sums.result, sums.x.batch, sums.clusters, dim, sums.plan.segments);
}

template <typename X>
__global__ void __launch_bounds__(kThreads, 3) atomic_kernel(const __grid_constant__ SumsTask<X, X> t) {
  // A warp has a row.
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (at >= t.x.batch * t.x.rows) return;
  const int64_t k = t.template centroid_of<false>(at), b = at / t.x.rows, row = at - b * t.x.rows;
  if (k < 0) return;
  const double weight = t.template weight_of<false>(at);
  const X* const x = t.x.at(b, row);
  double* const to = static_cast<double*>(t.result) + (b * t.clusters + k) * (t.x.dim + 1);
  for (int64_t d = threadIdx.x % 32; d <= t.x.dim; d += 32)
    atomicAdd(to + d, d < t.x.dim ? weight * static_cast<double>(widen(x[d])) : weight);
}

template <typename X, typename C>
__global__ void __launch_bounds__(kThreads, 3) flow_kernel(const __grid_constant__ SumsTask<X, C> t, X* dx) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (at >= t.x.batch * t.x.rows) return;
  const int64_t k = t.template centroid_of<true>(at), b = at / t.x.rows, row = at - b * t.x.rows, dim = t.x.dim;
  const double weight = t.template weight_of<true>(at);
  const X* const x = t.x.at(b, row);
  const C* const centroid = t.centroids + (b * t.clusters + (k < 0 ? 0 : k)) * dim;
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32) {
    const double apart = static_cast<double>(widen(x[d])) - static_cast<double>(widen(centroid[d]));
    dx[at * dim + d] = from_double<X>(k < 0 ? 0.0 : weight * apart);
  }
}

}  // namespace

void launch_ordered_sums(const SegmentSums& sums, cudaStream_t stream) {
  if (sums.flow) {
    for_pair(sums.x.element, sums.centroid_element,
             [&](auto x, auto c) { run<true, decltype(x), decltype(c)>(sums, stream); });
    for_element(sums.result_element, [&](auto r, auto) { merge<true, decltype(r)>(sums, stream); });
  } else {
    for_element(sums.x.element, [&](auto x, auto) { run<false, decltype(x), decltype(x)>(sums, stream); });
    merge<false, double>(sums, stream);
  }
}

void launch_atomic_sums(const SegmentSums& sums, cudaStream_t stream) {
  for_element(sums.x.element, [&](auto x, auto) {
    using X = decltype(x);
    launch(atomic_kernel<X>, blocks_of(sums.x.batch * sums.x.rows, kWarps), kThreads, stream, task_of<X, X>(sums));
  });
}

void launch_row_gradient(const SegmentSums& sums, void* dx, cudaStream_t stream) {
  for_pair(sums.x.element, sums.centroid_element, [&](auto x, auto c) {
    using X = decltype(x);
    using C = decltype(c);
    launch(flow_kernel<X, C>, blocks_of(sums.x.batch * sums.x.rows, kWarps), kThreads, stream, task_of<X, C>(sums),
           static_cast<X*>(dx));
  });
}

}  // namespace clusterq
