// Centroids made ready for the search: a centre, the centroids relative to it in the order in which tiles are read,
// offsets of the scores, and what the error bound needs.
#include "centroids_device.h"
#include "centroids_mma.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Centroids that the centre is the median of.
constexpr int64_t kSample = 31;

// A block has one batch entry, a warp one coordinate after the other. The median of evenly spread centroids: scores
// relative to it keep their digits whatever the offset of the data, and unlike the mean it does not follow a few
// centroids that lie far out.
template <typename C>
__global__ void __launch_bounds__(kThreads)
    centre_kernel(const C* centroids, const __grid_constant__ Book book, int64_t clusters, int64_t dim, bool may_raw) {
  __shared__ bool raw;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x, count = clusters < kSample ? clusters : kSample;
  const C* const own = centroids + (b * clusters + (lane < count ? lane * clusters / count : 0)) * dim;
  float* const centre = book.centre + b * dim;
  double spread = 0, square = 0;
  for (int64_t d = warp; d < dim; d += kWarps) {
    const float value = widen(own[d]);
    const unsigned known = __ballot_sync(kFullWarp, lane < count && is_number(value));
    int rank = 0;
    for (int other = 0; other < static_cast<int>(kSample); ++other) {
      const float v = __shfl_sync(kFullWarp, value, other);
      rank += (known >> other & 1) && (v < value || (v == value && other < lane));
    }
    const bool is_median = (known >> lane & 1) && rank == __popc(known) / 2;
    const int median_lane = __ffs(static_cast<int>(__ballot_sync(kFullWarp, is_median))) - 1;
    const float median = median_lane < 0 ? 0.0f : __shfl_sync(kFullWarp, value, median_lane);
    if (known >> lane & 1) {
      const double apart = static_cast<double>(value) - static_cast<double>(median);
      spread += apart * apart;
    }
    if (lane == 0) {
      square += static_cast<double>(median) * static_cast<double>(median);
      centre[d] = median;
    }
  }
  block_sum(spread, square);
  if (threadIdx.x == 0) {
    // Values of 16 bits multiply without error; worth more than the centre where that is within their spread.
    raw = may_raw && square * static_cast<double>(count) <= spread;
    book.facts[b] = {0, 0, raw};
  }
  __syncthreads();
  if (!raw) return;
  for (int64_t d = threadIdx.x; d < dim; d += kThreads) centre[d] = 0;
}

// A warp has one centroid, or one place of padding.
template <typename C>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const C* centroids, const __grid_constant__ Book book, int64_t clusters, int64_t dim, int64_t tiles,
                int64_t chunks, int64_t places) {
  const int lane = threadIdx.x % 32;
  const int64_t place = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (place >= places) return;
  const int64_t padded = tiles * kTileColumns, b = place / padded, k = place - b * padded;
  const C* const own = centroids + (b * clusters + k) * dim;
  const float* const centre = book.centre + b * dim;
  BookFacts& facts = book.facts[b];
  bool usable = k < clusters;
  float offset = -std::numeric_limits<float>::infinity();
  if (usable) {
    double squares = 0;
    for (int64_t d = lane; d < dim; d += 32) {
      const float value = widen(own[d]), relative = value - centre[d];
      usable = usable && is_number(value);
      squares += static_cast<double>(relative) * static_cast<double>(relative);
    }
    usable = __all_sync(kFullWarp, usable);
    squares = warp_sum(squares);
    const double half = 0.5 * squares;
    if (usable) {
      offset = -static_cast<float>(half);
      if (lane == 0) {
        // Of numbers that are not negative the bits rise with them. A factor makes up for the roundings.
        atomicMax(&facts.norm, __float_as_uint(static_cast<float>(sqrt(squares) * (1 + 1e-6))));
        atomicMax(&facts.half, __float_as_uint(static_cast<float>(half * (1 + 1e-6))));
      }
    }
  }
  if (lane == 0) book.offsets[place] = offset;
  const bool raw = facts.raw != 0;
  uint16_t* const tile = book.panels + (b * tiles + k / kTileColumns) * chunks * 2 * kTileColumns * kTileDepth;
  for (int64_t u = lane; u < chunks * 4; u += 32) {
    uint16_t* const to = tile + u / 4 * 2 * kTileColumns * kTileDepth +
                         panel_place(static_cast<int>(k % kTileColumns), static_cast<int>(u % 4));
    float values[8];
    uint32_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t d = u * 8 + i;
      const bool inside = usable && d < dim;
      values[i] = inside ? widen(own[d]) - centre[d] : 0.0f;
      if constexpr (sizeof(C) == 2) bits[i] = inside ? reinterpret_cast<const uint16_t*>(own)[d] : 0;
    }
    if (raw) {
      if constexpr (sizeof(C) == 2)
        store_unit(
            to, {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16});
    } else {
      const SplitUnit unit = split_unit(values);
      store_unit(to, unit.high);
      store_unit(to + kTileColumns * kTileDepth, unit.middle);
    }
  }
}

}  // namespace

void launch_prepare(const CentroidSearch& search, cudaStream_t stream) {
  const RowSource& x = search.x;
  const SearchPlan& plan = search.plan;
  const bool may_raw = x.element == search.centroid_element;
  for_element(search.centroid_element, [&](auto c, auto) {
    using C = decltype(c);
    if constexpr (!std::is_same_v<C, double>) {
      const C* const centroids = static_cast<const C*>(search.centroids);
      const int64_t clusters = search.clusters, places = x.batch * plan.padded();
      launch(centre_kernel<C>, x.batch, kThreads, stream, centroids, search.book, clusters, x.dim,
             may_raw && sizeof(C) == 2);
      launch(pack_kernel<C>, blocks_of(places, kWarps), kThreads, stream, centroids, search.book, clusters, x.dim,
             plan.tiles, plan.chunks, places);
    }
  });
}

}  // namespace clusterq
