// What the search found, made final: distances in float64, and a search in float64 of the rows that it left open.
//
// A row is decided when its best score leads the second by more than twice the bound on their errors; the pair of a row
// when the second leads the third as well.
#include "centroids_device.h"
#include "centroids_leaders.h"

namespace clusterq {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Rows that a warp looks at side by side, and open rows that a block searches at once.
constexpr int kHeld = kSettleRows / kWarps;

template <typename X, typename C>
struct SettleTask {
  Rows<X> x;
  const C* centroids;
  int64_t clusters, parts, blocks_per_entry;
  bool has_book, exact;
  Book book;
  const void* leaders;
  int64_t* index;
  std::conditional_t<std::is_same_v<X, double>, double, float>* distance;
  bool* undecided;
};

// The nearest centroids of a row, kCount of them, in rising order of distance and then of index; -1 for none.
template <int kCount>
struct Nearest {
  double distance[kCount];
  int32_t index[kCount];

  __device__ __forceinline__ Nearest() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      distance[i] = std::numeric_limits<double>::quiet_NaN();
      index[i] = -1;
    }
  }
  __device__ __forceinline__ void offer(double d, int32_t k) {
    if (k < 0 || d != d) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool ahead = index[i] < 0 || d < distance[i] || (d == distance[i] && k < index[i]);
      const double behind = distance[i];
      const int32_t place = index[i];
      if (ahead) {
        distance[i] = d;
        index[i] = k;
        d = behind;
        k = place;
        if (k < 0) return;
      }
    }
  }
};

template <typename X>
using Wide = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <typename X, typename C>
struct Rooms {
  // Of every warp: 32 values of 32 centroids, and of the rows.
  Wide<X> centroids[kWarps][32][33], rows[kWarps][kHeld][32];
  double distance[kWarps][2];
  int32_t index[kWarps][2];
  bool open[kSettleRows];
};

// Searches up to kHeld rows of a block in float64, squares added in the order of d; warps take turns of 32 centroids.
template <int kCount, typename X, typename C>
__device__ __forceinline__ void measure(const SettleTask<X, C>& t, Rooms<X, C>& room, int64_t b, int64_t first,
                                        const int (&held)[kHeld], int count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t dim = t.x.dim;
  Nearest<kCount> nearest[kHeld];
  for (int64_t base = warp * 32; base < t.clusters; base += kThreads) {
    const int64_t left = t.clusters - base;
    const C* const centroids = t.centroids + (b * t.clusters + base) * dim;
    double sums[kHeld] = {};
    for (int64_t d = 0; d < dim; d += 32) {
      const bool inside = d + lane < dim;
      __syncwarp();
#pragma unroll 8
      for (int k = 0; k < 32; ++k)
        room.centroids[warp][k][lane] = inside && k < left ? widen(centroids[k * dim + d + lane]) : Wide<X>(0);
#pragma unroll
      for (int r = 0; r < kHeld; ++r)
        if (r < count) room.rows[warp][r][lane] = inside ? widen(t.x.at(b, first + held[r])[d + lane]) : Wide<X>(0);
      __syncwarp();
      const int values = dim - d < 32 ? static_cast<int>(dim - d) : 32;
      for (int i = 0; i < values; ++i) {
        const double c = room.centroids[warp][lane][i];
#pragma unroll
        for (int r = 0; r < kHeld; ++r) {
          if (r >= count) break;
          const double apart = room.rows[warp][r][i] - c;
          sums[r] += apart * apart;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kHeld; ++r)
      if (r < count && lane < left) nearest[r].offer(sums[r], static_cast<int32_t>(base) + lane);
  }
#pragma unroll
  for (int r = 0; r < kHeld; ++r) {
    if (r >= count) break;
    for (int bits = 1; bits < 32; bits *= 2) {
      Nearest<kCount> other;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        other.distance[i] = __shfl_xor_sync(kFullWarp, nearest[r].distance[i], bits);
        other.index[i] = __shfl_xor_sync(kFullWarp, nearest[r].index[i], bits);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) nearest[r].offer(other.distance[i], other.index[i]);
    }
    __syncthreads();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        room.distance[warp][i] = nearest[r].distance[i];
        room.index[warp][i] = nearest[r].index[i];
      }
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int w = 1; w < kWarps; ++w)
      for (int i = 0; i < kCount; ++i) nearest[r].offer(room.distance[w][i], room.index[w][i]);
    const int64_t at = (b * t.x.rows + first + held[r]) * kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      t.index[at + i] = nearest[r].index[i];
      t.distance[at + i] = static_cast<Wide<X>>(nearest[r].distance[i]);
    }
  }
}

// Eight lanes look at a row as the search left it; for whole warps. Whether it stays open, in the first of them.
template <int kKept, typename X, typename C>
__device__ __forceinline__ bool look_at(const SettleTask<X, C>& t, int64_t b, int64_t row) {
  constexpr int kCount = kKept == 3 ? 2 : 1, kLanes = 32 / kHeld;
  const int lane = threadIdx.x % kLanes;
  const bool inside = row < t.x.rows;
  // The others of the warp have rows: it stays with them.
  row = inside ? row : t.x.rows - 1;
  const int64_t dim = t.x.dim, at = b * t.x.rows + row;
  const Leaders<kKept>* const found = static_cast<const Leaders<kKept>*>(t.leaders) + at;
  Leaders<kKept> leaders = found[0];
  for (int64_t part = 1; part < t.parts; ++part) leaders.merge(found[part * t.x.batch * t.x.rows]);
  const X* const x = t.x.at(b, row);
  const float* const centre = t.book.centre + b * dim;
  const C* centroids[kCount];
  const auto centroid = [&](int32_t k) { return t.centroids + (b * t.clusters + (k == kNoIndex ? 0 : k)) * dim; };
  centroids[0] = centroid(leaders.index);
  if constexpr (kKept == 3) centroids[1] = centroid(leaders.runner);
  double squares = 0, distance[kCount] = {};
#pragma unroll 4
  for (int64_t d = lane; d < dim; d += kLanes) {
    const Wide<X> value = widen(x[d]);
    const double relative = value - centre[d];
    squares += relative * relative;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const double apart = static_cast<double>(value) - static_cast<double>(widen(centroids[i][d]));
      distance[i] += apart * apart;
    }
  }
  for (int bits = 1; bits < kLanes; bits *= 2) {
    squares += __shfl_xor_sync(kFullWarp, squares, bits);
#pragma unroll
    for (int i = 0; i < kCount; ++i) distance[i] += __shfl_xor_sync(kFullWarp, distance[i], bits);
  }
  if (lane != 0 || !inside) return false;
  const BookFacts facts = t.book.facts[b];
  const ScoreBound bound =
      bound_scores(facts.raw != 0, dim, sqrt(squares) * (1 + 1e-6), static_cast<double>(__uint_as_float(facts.norm)),
                   static_cast<double>(__uint_as_float(facts.half)));
  // A NaN fails every one of these.
  bool decided = bound.magnitude < kLargestMagnitude && leaders.best > kNoScore;
  if constexpr (kKept == 3) decided = decided && leaders.second > kNoScore;
  if constexpr (kKept > 1) {
    if (t.exact) {
      decided = decided && static_cast<double>(leaders.best) - leaders.second > 2 * bound.error;
      if constexpr (kKept == 3)
        decided = decided && static_cast<double>(leaders.second) - leaders.third > 2 * bound.error;
    }
  }
  if (t.undecided != nullptr) {
    t.undecided[at] = !decided;
    return false;
  }
  if (decided) {
    t.index[at * kCount] = leaders.index;
    t.distance[at * kCount] = static_cast<Wide<X>>(distance[0]);
    if constexpr (kKept == 3) {
      t.index[at * kCount + 1] = leaders.runner;
      t.distance[at * kCount + 1] = static_cast<Wide<X>>(distance[1]);
    }
  }
  return !decided;
}

template <int kKept, typename X, typename C>
__global__ void __launch_bounds__(kThreads, 4) settle_kernel(const __grid_constant__ SettleTask<X, C> t) {
  __shared__ Rooms<X, C> room;
  const int64_t b = blockIdx.x / t.blocks_per_entry, first = (blockIdx.x - b * t.blocks_per_entry) * kSettleRows;
  const int own = threadIdx.x / (kThreads / kSettleRows);
  bool open = first + own < t.x.rows;
  if constexpr (!std::is_same_v<X, double>) {
    if (t.has_book) open = look_at<kKept>(t, b, first + own);
  }
  if (threadIdx.x % (kThreads / kSettleRows) == 0) room.open[own] = open;
  __syncthreads();
  int held[kHeld] = {}, count = 0;
  for (int place = 0; place < kSettleRows; ++place) {
    if (room.open[place]) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) held[r] = r == count ? place : held[r];
      ++count;
    }
    if (count == kHeld || (count > 0 && place == kSettleRows - 1)) {
      measure<kKept == 3 ? 2 : 1>(t, room, b, first, held, count);
      count = 0;
    }
  }
}

}  // namespace

void launch_settle(const CentroidSearch& search, cudaStream_t stream) {
  const int64_t per_entry = blocks_of(search.x.rows, kSettleRows);
  for_pair(search.x.element, search.centroid_element, [&](auto x, auto c) {
    using X = decltype(x);
    using C = decltype(c);
    const SettleTask<X, C> task{Rows<X>(search.x),
                                static_cast<const C*>(search.centroids),
                                search.clusters,
                                search.plan.parts,
                                per_entry,
                                search.has_book,
                                search.exact,
                                search.book,
                                search.leaders,
                                search.index,
                                static_cast<Wide<X>*>(search.distance),
                                search.undecided};
    const auto kernel = search.kept == 3   ? settle_kernel<3, X, C>
                        : search.kept == 2 ? settle_kernel<2, X, C>
                                           : settle_kernel<1, X, C>;
    launch(kernel, search.x.batch * per_entry, kThreads, stream, task);
  });
}

}  // namespace clusterq
