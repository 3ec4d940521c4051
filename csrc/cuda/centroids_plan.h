// How the centroid kernels divide their work, and the error bound of the search: host and device code without CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "indexing.h"
#include "inline.h"

namespace clusterq {

// A block of the search has 128 rows and passes by the centroids, 64 at a time, 32 values of D at a time.
constexpr int kTileRows = 128, kTileColumns = 64, kTileDepth = 32;
constexpr int kSearchThreads = 128, kSettleRows = 16;
// Two blocks to each of 132 multiprocessors: fewer share the centroids out as well.
constexpr int64_t kSearchBlocks = 2 * 132;
// Below this many numbers a codebook is measured in float64 directly: there is nothing for a search to save.
constexpr int64_t kDirectBook = 128;

struct SearchPlan {
  // Tiles of centroids and chunks of D.
  int64_t tiles = 0, chunks = 0;
  // Centroids are shared out among `parts` blocks, `part` tiles to each.
  int64_t part = 0, parts = 0, row_tiles = 0;

  CLUSTERQ_INLINE int64_t padded() const { return tiles * kTileColumns; }
  CLUSTERQ_INLINE int64_t panel_values() const { return tiles * chunks * 2 * kTileColumns * kTileDepth; }
};

inline SearchPlan plan_search(int64_t batch, int64_t rows, int64_t clusters, int64_t dim) {
  SearchPlan plan;
  plan.tiles = blocks_of(clusters, kTileColumns);
  plan.chunks = blocks_of(dim, kTileDepth);
  plan.row_tiles = blocks_of(rows, kTileRows);
  const int64_t blocks = std::max<int64_t>(batch * plan.row_tiles, 1);
  plan.part = blocks_of(plan.tiles, std::clamp<int64_t>(kSearchBlocks / blocks, 1, plan.tiles));
  plan.parts = blocks_of(plan.tiles, plan.part);
  return plan;
}

// Where the 8 values of D at 8 * unit of a row lie in a panel of rows of 32 values of 2 bytes: eight rows, or four
// units of two rows, fall on different banks.
CLUSTERQ_INLINE int panel_place(int row, int unit) { return (row * 4 + (unit ^ ((row >> 1) & 3))) * 8; }

// Above this a score may overflow float32: such rows are measured in float64.
constexpr double kLargestMagnitude = 1e37;

struct ScoreBound {
  // Bound on |x'.c'| + |c'|^2/2 over all finite centroids, and on the error of every score.
  double magnitude, error;
};

// A score s is x'.c' - |c'|^2/2 in float32, x' = fl(x - m), c' = fl(c - m); M = |x'| max|c'| + max |c'|^2/2. Its error
// against the same number without roundings is at most that of
// - the products left out: with 8 significant bits to a part, |x' - h| <= 2^-8 |x'|, so m M <= 2^-16 |x'||c'|, and what
//   two parts leave is at most 2^-17 |x'|, so r c' + (h + m) R <= 1.01 * 2^-16 |x'||c'|; together 2.01 * 2^-16. None
//   where 16-bit values are multiplied as they are: 22 bits of a product fit;
// - the tensor cores: of up to 17 numbers, products and accumulator, the bits below 2^-23 of the largest are dropped,
//   and as many in the result, in blocks of 8 products or of 16. That is at most 20 * 2^-23 M for each of
//   passes * ceil(D / 16) instructions, 1.02 M counting the parts of a product by themselves: (4 D + 64) * 2^-23 with
//   three passes, (1.3 D + 21) * 2^-23 with one;
// - 2 roundings of x' and c' in the product, 3 of c' and |c'|^2/2 in the offset, 2^-24 each: 2 * 2^-23;
// - what lies below the normal numbers, of parts or of products, with or without flushing to 0: D * 2^-120 (1 + |x'| +
//   max|c'|) as by the CPU kernel.
// PTX leaves the rounding of its matrix products open. This is what they were measured to do from sm_70 to sm_90 (Fasi
// et al., Numerical behavior of NVIDIA tensor cores, 2021), without a guard bit; float16 below its normal numbers
// counts in full. The last term is what a search in float64 may be off by itself: (D + 2) * 2^-53 of a squared
// distance, half for each score. `row_norm` is |x'| or more; so are the others.
CLUSTERQ_INLINE ScoreBound bound_scores(bool raw, int64_t dim, double row_norm, double largest_norm,
                                        double largest_half) {
  const double d = static_cast<double>(dim), reach = row_norm + largest_norm;
  const double magnitude = row_norm * largest_norm + largest_half;
  const double steps = (raw ? 1.3 * d + 24 : 4 * d + 68) * 0x1p-23;
  const double relative = 1.01 * (steps / (1 - steps) + (raw ? 0.0 : 2.01 * 0x1p-16));
  const double error = relative * magnitude + d * 0x1p-120 * (1 + reach) + (d + 3) * 0x1p-53 * reach * reach;
  // Too many terms for the slack in these numbers.
  return {magnitude, dim <= int64_t(1) << 18 ? error : HUGE_VAL};
}

// The ordered sums: rows of a batch entry are counted by tiles, put in order of their centroid, and added by segments
// of one centroid, whose sums are added in turn. All of it depends on the sizes alone, not on the device.
constexpr int64_t kSegmentRows = 256;

struct SumsPlan {
  // Rows of a tile and their number; counts are [batch, tiles, clusters].
  int64_t tile = 0, tiles = 0;
  // Most segments of a batch entry; partial sums are [batch, segments, dim + 1].
  int64_t segments = 0;
};

inline SumsPlan plan_sums(int64_t rows, int64_t clusters) {
  SumsPlan plan;
  // Counts are a 512th of N * K numbers, or fewer; a warp walks through a tile, 32 rows at a step.
  plan.tile = std::max<int64_t>(512, blocks_of(blocks_of(rows, 512), 32) * 32);
  plan.tiles = blocks_of(rows, plan.tile);
  // Of a centroid's segments all but one are full, and only centroids with rows have any.
  plan.segments = rows / kSegmentRows + std::min(rows, clusters);
  return plan;
}

}  // namespace clusterq
