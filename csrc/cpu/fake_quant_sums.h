// Sums of the fake-quantize kernels: double, taken in a fixed order over fixed shards.
#pragma once

#include <vector>

#include "fake_quant.h"

namespace clusterq {
namespace {

// A sum is this many partial sums, element i in number i % kPartial, added by halving: the same bits on every
// instruction set.
constexpr int kPartial = 16;

CLUSTERQ_INLINE double total_of(double (&partial)[kPartial]) {
  for (int width = kPartial / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

// Per-channel totals of [shards, row] accumulators: `add(channel, value)` for every column, its shards joined in order.
template <typename V, typename J, typename F>
void fold_pattern(const Walk& walk, const Pattern& pattern, std::vector<V>& partial, const J& join, const F& add) {
  V* const row = partial.data();
  for (int64_t shard = 1; shard < pattern.shards; ++shard) {
    const V* const next = row + shard * pattern.row;
    for (int64_t i = 0; i < pattern.row; ++i) row[i] = join(row[i], next[i]);
  }
  for (int64_t start = 0; start < pattern.row; start += walk.channels * walk.inner)
    for (int64_t c = 0; c < walk.channels; ++c)
      for (int64_t i = 0; i < walk.inner; ++i) add(c, row[start + c * walk.inner + i]);
}

// Per-channel totals of one value per task of `for_runs`.
template <typename V, typename F>
void fold_runs(const Walk& walk, const std::vector<V>& partial, const F& add) {
  const int64_t blocks = walk.blocks_per_run();
  const V* next = partial.data();
  for (int64_t o = 0; o < walk.outer; ++o)
    for (int64_t c = 0; c < walk.channels; ++c)
      for (int64_t b = 0; b < blocks; ++b) add(c, *next++);
}

}  // namespace
}  // namespace clusterq
