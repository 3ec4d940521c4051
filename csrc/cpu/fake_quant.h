// What the fake-quantize kernels share: the walk over dense memory, parameters per element.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/simd.h"
#include "numerics.h"

namespace clusterq {

// `backwards`: from the end of memory, where a pass before this one has just been.
Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
               std::optional<int64_t> axis, const std::string& activation, bool backwards);

// y and its mask, one bit per element.
std::tuple<Tensor, Tensor> masked_forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                          int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                                          const std::string& activation, const std::string& rule, bool backwards);

namespace {

using torch::stable::parallel_for;

template <typename A>
Activation<A> activation_of(const std::string& name) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  if (name == "none") return {-inf, inf};
  if (name == "relu") return {A(0), inf};
  CLUSTERQ_CHECK(name == "relu6", "activation must be none, relu or relu6");
  return {A(0), A(6)};
}

// The wrapped `empty_like` takes no dtype.
inline Tensor like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Dense memory seen as [outer, channels, inner]; [1, 1, numel] without a channel axis.
struct Walk {
  int64_t outer = 1, channels = 1, inner = 1;
  // Tasks of fixed extent, so that sums do not depend on the number of threads.
  static constexpr int64_t kBlock = 16384;
  // Below this an inner run is too short for one scalar grid: parameters are laid out per element instead.
  static constexpr int64_t kShortRun = 32;

  Walk(const Tensor& x, std::optional<int64_t> axis) {
    // Every op makes one before its threads start.
    cpu_level();
    if (axis.has_value()) {
      CLUSTERQ_CHECK(*axis >= -x.dim() && *axis < x.dim(), "axis is out of range");
      const int64_t a = *axis < 0 ? *axis + x.dim() : *axis;
      channels = x.size(a);
      // A channel axis of length 1 may carry any stride.
      inner = channels == 1 ? x.numel() : x.numel() == 0 ? 0 : x.stride(a);
    } else {
      inner = x.numel();
    }
    outer = x.numel() == 0 ? 0 : x.numel() / (channels * inner);
  }

  int64_t numel() const { return outer * channels * inner; }
  bool patterned() const { return channels > 1 && outer > 1 && inner < kShortRun; }
  int64_t blocks_per_run() const { return ceil_div(inner, kBlock); }
};

// Calls `body(first, length, channel, task)` for every block of every run with one channel; tasks are numbered in
// memory order: run * blocks_per_run() + block.
template <typename F>
void for_runs(const Walk& walk, const F& body) {
  const int64_t blocks = walk.blocks_per_run(), length = std::min(walk.inner, Walk::kBlock);
  if (walk.numel() == 0) return;
  parallel_for(0, walk.outer * walk.channels * blocks, ceil_div(2 * Walk::kBlock, length),
               [&](int64_t begin, int64_t end) {
                 int64_t run = begin / blocks, block = begin % blocks, channel = run % walk.channels;
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t start = block * Walk::kBlock;
                   body(run * walk.inner + start, std::min(Walk::kBlock, walk.inner - start), channel, task);
                   if (++block == blocks) {
                     block = 0;
                     ++run;
                     if (++channel == walk.channels) channel = 0;
                   }
                 }
               });
}

// Rows of channels * inner elements, repeated until a row is long enough to be worth a vector loop. `shards` splits the
// rows into fixed groups with their own accumulators, columns are split into blocks. `period`: the least whole number
// of vectors of 16 elements after which channels come again, the row where there is none.
struct Pattern {
  int64_t row, rows, columns, shards, rows_per_shard, period;
  explicit Pattern(const Walk& walk) {
    const int64_t once = walk.channels * walk.inner;
    // Rounded up to a multiple of 2, 4, 8 or 16 where that makes the row a whole number of vectors.
    int64_t repeats = std::max<int64_t>(1, 576 / once);
    for (int64_t step = 2; step <= 16 && once * repeats % 16 != 0; step *= 2) repeats = ceil_div(repeats, step) * step;
    row = once * std::min(repeats, walk.outer);
    period = row % 16 == 0 ? std::lcm(once, int64_t(16)) : row;
    rows = ceil_div(walk.numel(), row);
    columns = ceil_div(row, Walk::kBlock);
    // At most 64 shards, fewer where their accumulators would outgrow the cache or there is little to add up.
    const int64_t most = std::min((int64_t(1) << 17) / row, walk.numel() >> 16);
    const int64_t wanted = std::clamp<int64_t>(most, 1, 64);
    rows_per_shard = ceil_div(rows, std::min(rows, wanted));
    shards = ceil_div(rows, rows_per_shard);
  }
};

// Calls `body(first, length, column, shard, rows)` for every column block of every group of rows, up to kTile of them,
// `pattern.row` elements apart; all rows of a (shard, column) in order, on one thread. What a column needs, its grid
// and its sums, is loaded once for a group.
template <typename F>
void for_pattern(const Walk& walk, const Pattern& pattern, const F& body) {
  constexpr int64_t kTile = 8;
  const int64_t total = walk.numel(), per_task = pattern.rows_per_shard * std::min(pattern.row, Walk::kBlock);
  // The last row may be cut short: then it is a group of its own.
  const int64_t whole = total / pattern.row;
  parallel_for(0, pattern.shards * pattern.columns, ceil_div(2 * Walk::kBlock, per_task),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t shard = task / pattern.columns, column = task % pattern.columns * Walk::kBlock;
                   const int64_t last = std::min(pattern.rows, (shard + 1) * pattern.rows_per_shard);
                   int64_t rows = 1;
                   for (int64_t row = shard * pattern.rows_per_shard; row < last; row += rows) {
                     rows = row < whole ? std::min({kTile, last - row, whole - row}) : 1;
                     const int64_t first = row * pattern.row + column;
                     const int64_t length = std::min({Walk::kBlock, pattern.row - column, total - first});
                     if (length > 0) body(first, length, column, shard, rows);
                   }
                 }
               });
}

// Grids of all channels, and the two ways a vector loop sees them: one for the run, or one per element of the row.
template <typename A>
struct OneGrid {
  Grid<A> grid;
  CLUSTERQ_INLINE Grid<A> at(int64_t) const { return grid; }
  A least_scale() const { return grid.scale; }
};

// `period`: what lies so many elements apart has the same grid. `least`: the least scale of all channels.
template <typename A>
struct GridRow {
  const A *scale, *inverse, *zero_point;
  A quant_min, quant_max, least;
  int64_t period;
  A least_scale() const { return least; }
  CLUSTERQ_INLINE Grid<A> at(int64_t i) const { return {scale[i], inverse[i], zero_point[i], quant_min, quant_max}; }
};

template <typename A>
struct Grids {
  std::vector<A> scale, inverse, zero_point;
  A quant_min, quant_max, least;
  int64_t channels, period = 0;

  Grids(const A* scales, const A* zero_points, int64_t count, int64_t low, int64_t high)
      : scale(scales, scales + count),
        inverse(count),
        zero_point(zero_points, zero_points + count),
        quant_min(static_cast<A>(low)),
        quant_max(static_cast<A>(high)),
        least(std::numeric_limits<A>::infinity()),
        channels(count) {
    for (int64_t c = 0; c < count; ++c) least = std::min(least, scale[c]);
    for (int64_t c = 0; c < count; ++c) inverse[c] = A(1) / scale[c];
  }

  static Grids of(const Tensor& scale, const Tensor& zero_point, const Walk& walk, int64_t low, int64_t high) {
    constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    check_dtype(scale, dtype, "scale");
    check_dtype(zero_point, dtype, "zero_point");
    check_numel(scale, walk.channels, "scale");
    check_numel(zero_point, walk.channels, "zero_point");
    const Tensor s = packed(scale), z = packed(zero_point);
    return Grids(static_cast<const A*>(s.const_data_ptr()), static_cast<const A*>(z.const_data_ptr()), walk.channels,
                 low, high);
  }

  OneGrid<A> one(int64_t c) const { return {{scale[c], inverse[c], zero_point[c], quant_min, quant_max}}; }

  // Lays the parameters out as one row of the pattern.
  Grids expanded(const Walk& walk, const Pattern& pattern) const {
    Grids wide = *this;
    wide.period = pattern.period;
    for (auto* list : {&wide.scale, &wide.inverse, &wide.zero_point}) {
      const std::vector<A> narrow = *list;
      list->resize(pattern.row);
      A* out = list->data();
      for (int64_t repeat = 0; repeat < pattern.row; repeat += walk.channels * walk.inner)
        for (int64_t c = 0; c < walk.channels; ++c, out += walk.inner) std::fill(out, out + walk.inner, narrow[c]);
    }
    return wide;
  }

  GridRow<A> row(int64_t column) const {
    return {scale.data() + column,
            inverse.data() + column,
            zero_point.data() + column,
            quant_min,
            quant_max,
            least,
            period};
  }
};

// Calls `body(first, length)` for blocks of `kLength` elements in memory order, or backwards within each thread's
// share: what a first pass read last is then read first.
template <int64_t kLength, typename F>
void for_blocks(int64_t numel, bool backwards, const F& body) {
  parallel_for(0, ceil_div(numel, kLength), ceil_div(2 * Walk::kBlock, kLength), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = (backwards ? begin + end - 1 - k : k) * kLength;
      body(first, std::min(kLength, numel - first));
    }
  });
}

// Calls `body(first, length, place)` for the pieces of a block: of one channel each, `place` being the channel, or of
// one row of the pattern, `place` being the column.
template <typename F>
void for_pieces(const Walk& walk, const std::optional<Pattern>& pattern, int64_t first, int64_t n, const F& body) {
  const int64_t end = first + n, length = pattern ? pattern->row : walk.inner;
  int64_t run = first / length, at = first - run * length, channel = run % walk.channels;
  for (; first < end; at = 0) {
    const int64_t piece = std::min(length - at, end - first);
    body(first, piece, pattern ? at : channel);
    first += piece;
    if (++channel == walk.channels) channel = 0;
  }
}

// Grids of a walk, ready for either kind of piece.
template <typename A>
struct PieceGrids {
  std::optional<Pattern> pattern;
  Grids<A> grids;

  PieceGrids(const Walk& walk, Grids<A> narrow) : grids(std::move(narrow)) {
    if (!walk.patterned()) return;
    pattern.emplace(walk);
    grids = grids.expanded(walk, *pattern);
  }

  template <typename F>
  void with(int64_t place, const F& body) const {
    pattern ? body(grids.row(place)) : body(grids.one(place));
  }
};

// Runs an elementwise `body(first, length, grids)` over all of x with the fitting kind of parameters.
template <typename A, typename F>
void elementwise(const Walk& walk, const Grids<A>& grids, const F& body, bool backwards = false) {
  if (walk.numel() == 0) return;
  const PieceGrids<A> pieces(walk, grids);
  for_blocks<Walk::kBlock>(walk.numel(), backwards, [&](int64_t start, int64_t length) {
    for_pieces(walk, pieces.pattern, start, length, [&](int64_t first, int64_t n, int64_t place) {
      pieces.with(place, [&](auto g) { body(first, n, g); });
    });
  });
}

}  // namespace
}  // namespace clusterq
