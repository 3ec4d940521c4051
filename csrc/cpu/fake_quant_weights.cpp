// Weights on the grid of each channel's own minimum and maximum: one weight, or all of a network at once.
#include "fake_quant_forward.h"
#include "fake_quant_ranges.h"

namespace clusterq {
namespace {

// A channel that lies in one piece and is no longer than this is quantized while its range search has it in the cache;
// a longer one is shared by threads.
constexpr int64_t kLongest = int64_t(1) << 18;

struct Weight {
  Tensor from, to;
  Walk walk;
  // Of its first channel among those of all weights.
  int64_t offset;
  explicit Weight(const Tensor& w, int64_t axis, int64_t first) : from(dense(w)), walk(from, axis), offset(first) {
    if (fused()) to = output_like(from);
  }
  bool fused() const { return walk.outer <= 1 && walk.inner <= kLongest; }
};

// Channels [begin, end) of one weight: a task.
struct Channels {
  const Weight* weight;
  int64_t begin, end;
};

// The channels of all fused weights in tasks of about as many elements each.
std::vector<Channels> tasks_of(const std::vector<Weight>& weights) {
  std::vector<Channels> tasks;
  for (const Weight& w : weights) {
    if (!w.fused()) continue;
    const int64_t count = ceil_div(Walk::kBlock, std::max<int64_t>(w.walk.inner, 1));
    for (int64_t c = 0; c < w.walk.channels; c += count) tasks.push_back({&w, c, std::min(c + count, w.walk.channels)});
  }
  return tasks;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> weights(std::vector<Tensor> inputs, int64_t quant_min,
                                                        int64_t quant_max, int64_t axis, bool symmetric) {
  CLUSTERQ_CHECK(!inputs.empty(), "weights is empty");
  const ScalarType dtype = inputs[0].scalar_type();
  std::vector<Weight> all;
  int64_t channels = 0;
  for (const Tensor& w : inputs) {
    check_dtype(w, dtype, "a weight");
    all.emplace_back(w, axis, channels);
    channels += all.back().walk.channels;
  }
  const std::array<int64_t, 1> shape{channels};
  Tensor scale = torch::stable::new_empty(inputs[0], shape, compute_dtype(dtype));
  Tensor zero_point = torch::stable::new_empty(inputs[0], shape, compute_dtype(dtype));
  const std::vector<Channels> tasks = tasks_of(all);
  for_floating(dtype, "w", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    auto* to_scale = static_cast<A*>(scale.mutable_data_ptr());
    auto* to_zero_point = static_cast<A*>(zero_point.mutable_data_ptr());
    const auto none = activation_of<A>("none");
    const auto grid_of = [&](int64_t c, const Range<A>& range) {
      const Grid<A> grid = range_to_grid(range.low, range.high, quant_min, quant_max, symmetric);
      to_scale[c] = grid.scale;
      to_zero_point[c] = grid.zero_point;
      return grid;
    };
    parallel_for(0, static_cast<int64_t>(tasks.size()), 2, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Weight& w = *tasks[k].weight;
        const int64_t n = w.walk.outer * w.walk.inner;
        const auto* from = static_cast<const T*>(w.from.const_data_ptr());
        auto* to = static_cast<T*>(const_cast<void*>(w.to.const_data_ptr()));
        for (int64_t c = tasks[k].begin; c < tasks[k].end; ++c) {
          const OneGrid<A> grid{grid_of(w.offset + c, range_of<T, A>(from + c * n, n, none))};
          forward_piece<T, A>(from + c * n, to + c * n, n, grid, none);
        }
      }
    });
    for (Weight& w : all) {
      if (w.fused()) continue;
      const auto ranges = channel_ranges<T, A>(w.walk, none, static_cast<const T*>(w.from.const_data_ptr()));
      for (int64_t c = 0; c < w.walk.channels; ++c) grid_of(w.offset + c, ranges[c]);
      Tensor s = torch::stable::narrow(scale, 0, w.offset, w.walk.channels);
      Tensor z = torch::stable::narrow(zero_point, 0, w.offset, w.walk.channels);
      w.to = forward(w.from, s, z, quant_min, quant_max, axis, "none", true);
    }
  });
  std::vector<Tensor> quantized;
  for (const Weight& w : all) quantized.push_back(w.to);
  return {quantized, scale, zero_point};
}

std::tuple<Tensor, Tensor, Tensor> weight(const Tensor& w, int64_t quant_min, int64_t quant_max, int64_t axis,
                                          bool symmetric) {
  const auto [quantized, scale, zero_point] = weights({w}, quant_min, quant_max, axis, symmetric);
  return {quantized[0], scale, zero_point};
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("fake_quantize_weight", TORCH_BOX(&clusterq::weight));
  m.impl("fake_quantize_weights", TORCH_BOX(&clusterq::weights));
}
