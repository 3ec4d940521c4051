// How the statistics kernels divide x among blocks. Host code without CUDA: tests/test_cuda_indexing.py reads it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "indexing.h"

namespace clusterq {

// x in memory order: [images, channels, positions], or [images, positions, channels] where `rows`.
struct Samples {
  int64_t images = 0, channels = 0, positions = 0;
  bool rows = false;

  int64_t numel() const { return images * channels * positions; }
};

constexpr int kStatisticsThreads = 128;
// A plane of at most this many elements belongs to lanes of one warp, 32 elements to each at most.
constexpr int64_t kSmallPlane = 1024;
// Elements that a block of the slab walk takes, if its planes are small.
constexpr int64_t kSlab = 2048;
// Four blocks to each of 132 multiprocessors; and sixteen, where partial results are merged anyway.
constexpr int64_t kFewBlocks = 4 * 132, kManyBlocks = 16 * 132;

// kPacks: lanes hold a plane in registers, by aligned packs. kSlab: planes that start anywhere, through shared memory.
// kBlock: blocks take parts of large planes. kRows: channels innermost.
enum class Walk { kPacks, kSlab, kBlock, kRows };

struct StatisticsPlan {
  Walk walk = Walk::kPacks;
  // Elements of an access along the rows: those of 16 bytes, or 1.
  int width = 1;
  // Neighbouring threads that share a plane, or lie along the channels: a power of two, at most 32.
  int lanes = 1;
  // Planes to a block of the slab walk.
  int64_t slab = 0;
  // Every image is cut into `parts` segments of `part` positions, the last one shorter.
  int64_t part = 0, parts = 1;
  int64_t tiles = 1, blocks = 0;
};

inline int lanes_for(int64_t least, int most) {
  int lanes = 1;
  while (lanes < most && lanes < least) lanes *= 2;
  return lanes;
}

// Threads of a row whose columns are summed by a thread each.
constexpr int most_lanes(int width) { return std::min(32, kStatisticsThreads / width); }

// `aligned`: x, and where it is written y, start on 16 bytes. `merged`: another launch joins the segments anyway.
inline StatisticsPlan plan_planes(int bytes, const Samples& x, bool aligned, bool merged) {
  StatisticsPlan plan;
  const int wide = 16 / bytes;
  const int64_t planes = x.images * x.channels, positions = x.positions;
  plan.part = positions;
  if (positions > kSmallPlane) {
    plan.walk = Walk::kBlock;
    const int64_t wanted = std::max<int64_t>((merged ? kManyBlocks : kFewBlocks) / planes, 1);
    // Parts of whole packs; a part has work for every thread of a block.
    if (planes < kFewBlocks) plan.part = std::max(kSmallPlane, positions / (wanted + 1) / wide * wide);
    plan.parts = blocks_of(positions, plan.part);
    plan.blocks = planes * plan.parts;
    return plan;
  }
  if (aligned && positions % wide == 0) {
    const int64_t packs = positions / wide;
    plan.lanes = lanes_for((packs + 3) / 4, 32);
    while (plan.lanes < 32 && plan.lanes < packs && blocks_of(planes * plan.lanes, kStatisticsThreads) < kFewBlocks)
      plan.lanes *= 2;
    plan.blocks = blocks_of(planes * plan.lanes, kStatisticsThreads);
    return plan;
  }
  plan.walk = Walk::kSlab;
  plan.lanes = lanes_for((positions + 15) / 16, 32);
  // A slab is whole packs; every group of lanes has the same number of planes.
  const int64_t groups = std::max(kStatisticsThreads / plan.lanes, wide);
  plan.slab = groups * std::max<int64_t>(kSlab / (groups * positions), 1);
  while (plan.slab > groups && blocks_of(planes, plan.slab) < kFewBlocks) plan.slab -= groups;
  plan.blocks = blocks_of(planes, plan.slab);
  return plan;
}

// `height`: rows that a block reads at once, `held` of them by each thread before it needs them.
inline StatisticsPlan plan_rows(int bytes, const Samples& x, bool aligned, bool merged, int held) {
  StatisticsPlan plan;
  plan.walk = Walk::kRows;
  const int wide = 16 / bytes;
  plan.width = aligned && x.channels % wide == 0 ? wide : 1;
  const int64_t packs = blocks_of(x.channels, plan.width);
  plan.lanes = lanes_for(packs, most_lanes(plan.width));
  const auto columns = [&] { return x.images * blocks_of(packs, plan.lanes); };
  // As narrow as one sector of 32 bytes, where parts would cost another launch, while there is a row for every thread.
  while (!merged && columns() < kFewBlocks && plan.lanes * plan.width * bytes > 32 &&
         2 * kStatisticsThreads / plan.lanes <= x.positions)
    plan.lanes /= 2;
  plan.tiles = blocks_of(packs, plan.lanes);
  const int64_t height = kStatisticsThreads / plan.lanes;
  const auto cut = [&](int64_t blocks) { return x.positions / blocks_of(blocks, columns()); };
  plan.part = x.positions;
  if (merged) {
    plan.part = std::max(cut(kManyBlocks), std::min(height * held, cut(kFewBlocks)));
  } else if (columns() < kFewBlocks) {
    plan.part = cut(kFewBlocks);
  }
  plan.part = std::min(std::max(plan.part, height), x.positions);
  plan.parts = blocks_of(x.positions, plan.part);
  plan.blocks = columns() * plan.parts;
  return plan;
}

// Rows that a thread holds.
constexpr int kHeldRows = 8;

inline StatisticsPlan plan_statistics(int bytes, const Samples& x, bool aligned, bool merged) {
  return x.rows ? plan_rows(bytes, x, aligned, merged, kHeldRows) : plan_planes(bytes, x, aligned, merged);
}

// The backward kernels map elements one by one: planes as memory runs, rows by column. `held`: packs, or rows, of a
// thread.
struct BackwardPlan {
  bool rows = false;
  int width = 1, lanes = 1, held = 2;
  int64_t tiles = 1, blocks = 0;
};

inline BackwardPlan plan_backward(int bytes, const Samples& x, bool aligned) {
  BackwardPlan plan;
  const int wide = 16 / bytes;
  // One position per image and channel is a row too, and rows are read without a look for boundaries.
  plan.rows = x.rows || (x.positions == 1 && x.channels > 1);
  plan.width = aligned && (plan.rows ? x.channels % wide == 0 : x.positions >= wide) ? wide : 1;
  if (!plan.rows) {
    plan.blocks = blocks_of(x.numel(), int64_t(kStatisticsThreads) * plan.width * plan.held);
    return plan;
  }
  const int64_t packs = blocks_of(x.channels, plan.width), rows = x.images * x.positions;
  plan.lanes = lanes_for(packs, 32);
  plan.tiles = blocks_of(packs, plan.lanes);
  plan.held = 4;
  const auto blocks = [&] { return plan.tiles * blocks_of(rows, kStatisticsThreads / plan.lanes * plan.held); };
  while (plan.held > 1 && blocks() < kFewBlocks) plan.held /= 2;
  plan.blocks = blocks();
  return plan;
}

// Sums over images, and positions where channels are innermost: memory as [rows, columns], `inner` columns to a
// channel. Double sums of every split and column are joined by another launch.
struct ParameterPlan {
  int width = 1, lanes = 1;
  int64_t rows = 0, columns = 0, inner = 1;
  // Rows of a split.
  int64_t part = 0, splits = 1, tiles = 1, blocks = 0;
};

// Rows of a thread, summed in the arithmetic type.
constexpr int64_t kSummedRows = 32;

inline ParameterPlan plan_parameters(int bytes, const Samples& x, bool aligned) {
  ParameterPlan plan;
  plan.inner = x.rows ? 1 : x.positions;
  plan.columns = x.channels * plan.inner;
  plan.rows = x.numel() / plan.columns;
  const int wide = 16 / bytes;
  plan.width = aligned && plan.columns % wide == 0 ? wide : 1;
  const int64_t packs = blocks_of(plan.columns, plan.width);
  plan.lanes = lanes_for(packs, most_lanes(plan.width));
  plan.tiles = blocks_of(packs, plan.lanes);
  const int64_t height = kStatisticsThreads / plan.lanes;
  const int64_t cut = plan.rows / blocks_of(kFewBlocks, plan.tiles);
  plan.part = std::clamp<int64_t>(cut, height, height * kSummedRows);
  plan.splits = blocks_of(plan.rows, plan.part);
  plan.blocks = plan.tiles * plan.splits;
  return plan;
}

}  // namespace clusterq
