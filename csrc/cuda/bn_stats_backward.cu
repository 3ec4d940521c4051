// Backward of the statistics on CUDA, alone or added to that of eval-mode BatchNorm: dx = grad * scale +
// a * (x - center) + b, rounded once. Bytes per element of float32: 8, with BatchNorm 12, without a gradient of the
// variance 8.
#include "bn_stats_device.h"

namespace clusterq {
namespace {

constexpr int kHeldPacks = 2, kMostRows = 4;

// Where one x lies: what a block needs to find its elements and their channels.
template <typename T>
struct Place {
  const T *x, *grad;
  T* dx;
  int64_t images, channels, positions, first_column;
  Divider by_positions, by_channels;
  uint32_t first_block, tiles;
  uint8_t lanes, held;
  bool rows, wide, small;
};

// Rows of coefficients, 0 apart where one serves all images.
template <typename A>
struct Coefficients {
  const A *center, *grad_mean, *grad_var;
  int64_t center_stride, mean_stride, var_stride;
  const A *weight, *running_var;
  A mean_factor, var_factor, eps;

  __device__ __forceinline__ bool per_image() const {
    return center_stride != 0 || mean_stride != 0 || var_stride != 0;
  }
};

template <typename A>
struct Slope {
  A a, center, b;
  // Where a is 0, x may be anything.
  __device__ __forceinline__ A value(A x) const { return a == A(0) ? b : multiply_add(a, x - center, b); }
};

template <typename A>
__device__ __forceinline__ Slope<A> slope_of(const Coefficients<A>& c, int64_t image, int64_t column) {
  Slope<A> slope{0, 0, 0};
  if (c.grad_var != nullptr) {
    slope.a = c.grad_var[image * c.var_stride + column] * c.var_factor;
    slope.center = c.center[image * c.center_stride + column];
  }
  if (c.grad_mean != nullptr) slope.b = c.grad_mean[image * c.mean_stride + column] * c.mean_factor;
  return slope;
}

template <typename A>
__device__ __forceinline__ A scale_of(const Coefficients<A>& c, int64_t channel) {
  const A inverse = inverse_root(c.running_var[channel] + c.eps);
  return c.weight == nullptr ? inverse : c.weight[channel] * inverse;
}

// Contiguous x, walked in memory order; a plane is a pack long at least, so that a pack has elements of two at most.
template <bool kGrad, int V, typename T, typename A>
__device__ __forceinline__ void planes_backward(const Place<T>& place, const Coefficients<A>& c, int64_t block) {
  const int64_t numel = place.images * place.channels * place.positions;
  const int64_t start = (block * kHeldPacks * kStatisticsThreads + threadIdx.x) * V;
  Pack<T, V> values[kHeldPacks]{}, grads[kHeldPacks]{};
#pragma unroll
  for (int k = 0; k < kHeldPacks; ++k) {
    const int64_t at = start + k * kStatisticsThreads * V;
    if (at >= numel) continue;
    if (c.grad_var != nullptr) values[k] = load_some<V>(place.x + at, numel - at);
    if constexpr (kGrad) grads[k] = load_some<V>(place.grad + at, numel - at);
  }
#pragma unroll
  for (int k = 0; k < kHeldPacks; ++k) {
    const int64_t at = start + k * kStatisticsThreads * V, left = numel - at;
    if (left <= 0) continue;
    const int64_t plane = place.by_positions.quotient(at, place.small);
    const int64_t image = place.by_channels.quotient(plane, place.small), channel = plane - image * place.channels;
    const int64_t rest = (plane + 1) * place.positions - at;
    const Slope<A> slope = slope_of(c, image, place.first_column + channel);
    const A scale = kGrad ? scale_of(c, channel) : A(0);
    Pack<T, V> result;
    const auto each = [&](const auto& slope_at, const auto& scale_at) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A dx = slope_at(v).value(A(widen(values[k].at[v])));
        if constexpr (kGrad) dx = multiply_add(A(widen(grads[k].at[v])), scale_at(v), dx);
        result.at[v] = Narrow<T>::of(dx);
      }
    };
    if (rest >= V || left == rest) {
      each([&](int) { return slope; }, [&](int) { return scale; });
    } else {
      const int mine = static_cast<int>(rest);
      const bool wraps = channel + 1 == place.channels;
      const int64_t next = wraps ? 0 : channel + 1;
      const Slope<A> next_slope = slope_of(c, image + wraps, place.first_column + next);
      const A next_scale = kGrad ? scale_of(c, next) : A(0);
      each(
          [&](int v) {
            return Slope<A>{v < mine ? slope.a : next_slope.a, v < mine ? slope.center : next_slope.center,
                            v < mine ? slope.b : next_slope.b};
          },
          [&](int v) { return v < mine ? scale : next_scale; });
    }
    store_some(place.dx + at, result, left);
  }
}

// Channels innermost: a thread has V neighbouring channels of a few rows.
template <bool kGrad, int V, typename T, typename A>
__device__ __forceinline__ void rows_backward(const Place<T>& place, const Coefficients<A>& c, unsigned block) {
  const int lanes = place.lanes, shift = __ffs(lanes) - 1, height = kStatisticsThreads >> shift;
  const unsigned group = block / place.tiles, tile = block - group * place.tiles;
  const int64_t rows = place.images * place.positions, channels = place.channels;
  const int64_t column = (static_cast<int64_t>(tile) * lanes + (threadIdx.x & (lanes - 1))) * V;
  if (column >= channels) return;
  const int64_t first = static_cast<int64_t>(group) * height * place.held + (threadIdx.x >> shift);
  Pack<T, V> values[kMostRows]{}, grads[kMostRows]{};
#pragma unroll
  for (int k = 0; k < kMostRows; ++k) {
    const int64_t row = first + k * height;
    if (k >= place.held || row >= rows) continue;
    if (c.grad_var != nullptr) values[k] = load_pack<V>(place.x + row * channels + column);
    if constexpr (kGrad) grads[k] = load_pack<V>(place.grad + row * channels + column);
  }
  Slope<A> slope[V];
  A scale[V];
#pragma unroll
  for (int v = 0; v < V; ++v) scale[v] = kGrad ? scale_of(c, column + v) : A(0);
  int64_t current = -1;
#pragma unroll
  for (int k = 0; k < kMostRows; ++k) {
    const int64_t row = first + k * height;
    if (k >= place.held || row >= rows) continue;
    const int64_t image = c.per_image() ? place.by_positions.quotient(row, place.small) : 0;
    if (image != current) {
#pragma unroll
      for (int v = 0; v < V; ++v) slope[v] = slope_of(c, image, place.first_column + column + v);
      current = image;
    }
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A dx = slope[v].value(A(widen(values[k].at[v])));
      if constexpr (kGrad) dx = multiply_add(A(widen(grads[k].at[v])), scale[v], dx);
      result.at[v] = Narrow<T>::of(dx);
    }
    store_pack(place.dx + row * channels + column, result);
  }
}

template <bool kRows, bool kGrad, int V, typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_backward_kernel(const __grid_constant__ Place<T> place, const __grid_constant__ Coefficients<A> c) {
  if constexpr (kRows) {
    rows_backward<kGrad, V>(place, c, blockIdx.x);
  } else {
    planes_backward<kGrad, V>(place, c, blockIdx.x);
  }
}

// Several x in one launch; a table fits into the 4 KB of parameters that every launch may have.
constexpr int kMostListed = 26;

template <typename T, typename A>
struct BackwardTable {
  Place<T> entries[kMostListed];
  Coefficients<A> common;
  int count;
};
static_assert(sizeof(BackwardTable<double, double>) <= 4096);

template <typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_backward_list_kernel(const __grid_constant__ BackwardTable<T, A> table) {
  const Place<T>& place = table.entries[find_entry(table.entries, table.count, blockIdx.x)];
  const unsigned block = blockIdx.x - place.first_block;
  Coefficients<A> c = table.common;
  c.mean_factor = reciprocal(static_cast<A>(place.positions));
  c.var_factor = 2 * c.mean_factor;
  if (place.rows) {
    place.wide ? rows_backward<false, kWide<T>>(place, c, block) : rows_backward<false, 1>(place, c, block);
  } else {
    place.wide ? planes_backward<false, kWide<T>>(place, c, block) : planes_backward<false, 1>(place, c, block);
  }
}

template <typename T>
Place<T> place_of(const BackwardTask& task, BackwardPlan& plan) {
  const Samples& samples = task.samples;
  plan = plan_backward(sizeof(T), samples, aligned(task.x) && aligned(task.dx) && aligned(task.grad));
  Place<T> place{};
  place.x = static_cast<const T*>(task.x);
  place.grad = static_cast<const T*>(task.grad);
  place.dx = static_cast<T*>(task.dx);
  place.images = samples.images;
  place.channels = samples.channels;
  place.positions = samples.positions;
  place.by_positions = Divider(samples.positions);
  place.by_channels = Divider(samples.channels);
  place.tiles = static_cast<uint32_t>(plan.tiles);
  place.lanes = static_cast<uint8_t>(plan.lanes);
  place.held = static_cast<uint8_t>(plan.held);
  place.rows = plan.rows;
  place.wide = plan.width > 1;
  place.small = samples.numel() <= int64_t(1) << 30;
  return place;
}

template <typename A>
Coefficients<A> coefficients_of(const BackwardTask& task) {
  return {static_cast<const A*>(task.center.data),
          static_cast<const A*>(task.grad_mean.data),
          static_cast<const A*>(task.grad_var.data),
          task.center.stride,
          task.grad_mean.stride,
          task.grad_var.stride,
          static_cast<const A*>(task.weight),
          static_cast<const A*>(task.running_var),
          static_cast<A>(task.mean_factor),
          static_cast<A>(task.var_factor),
          static_cast<A>(task.eps)};
}

}  // namespace

void launch_statistics_backward(Element element, const BackwardTask& task, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    BackwardPlan plan;
    const Place<T> place = place_of<T>(task, plan);
    const Coefficients<A> c = coefficients_of<A>(task);
    const auto run = [&](auto rows, auto grad, auto width) {
      launch(statistics_backward_kernel<decltype(rows)::value, decltype(grad)::value, decltype(width)::value, T, A>,
             plan.blocks, kStatisticsThreads, stream, place, c);
    };
    const auto choose = [&](auto rows, auto grad) {
      if (place.wide) return run(rows, grad, std::integral_constant<int, kWide<T>>{});
      run(rows, grad, std::integral_constant<int, 1>{});
    };
    const auto layout = [&](auto grad) {
      place.rows ? choose(std::true_type{}, grad) : choose(std::false_type{}, grad);
    };
    task.grad == nullptr ? layout(std::false_type{}) : layout(std::true_type{});
  });
}

// All tasks have the same rows of coefficients, those of each x beginning at its own column.
void launch_statistics_backward_list(Element element, const BackwardTask* tasks, int64_t count, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    BackwardTable<T, A> table{};
    int64_t blocks = 0;
    const auto flush = [&] {
      if (blocks > 0) launch(statistics_backward_list_kernel<T, A>, blocks, kStatisticsThreads, stream, table);
      table.count = 0;
      blocks = 0;
    };
    int64_t column = 0;
    for (int64_t i = 0; i < count; ++i) {
      const BackwardTask& task = tasks[i];
      BackwardPlan plan;
      if (task.samples.numel() > 0) {
        Place<T> place = place_of<T>(task, plan);
        if (table.count == kMostListed || blocks + plan.blocks >= int64_t(1) << 31) flush();
        table.common = coefficients_of<A>(task);
        place.first_column = column;
        place.first_block = static_cast<uint32_t>(blocks);
        table.entries[table.count++] = place;
        blocks += plan.blocks;
      }
      column += task.samples.channels;
    }
    flush();
  });
}

}  // namespace clusterq
