// Merge of moments on CUDA: parts of an image, images of a batch or of a class. A block merges 32 channels of a group,
// in two passes over moments that the first one left in the cache: the mean, then the squares about it. In float64 and
// in a fixed order: the same bits every time.
#include "bn_stats_device.h"

namespace clusterq {
namespace {

// Segments that a warp loads before it adds them up.
constexpr int kAhead = 8;
constexpr int kMostThreads = 512;

template <typename A>
struct MergeTask {
  // Segments of a group, and how many segments the next group begins later.
  int64_t segments, step;
  int64_t channels, positions, part;
  Divider by_parts;
  bool small;
  uint32_t parts, tiles;
  const int64_t* labels;
  const A* weights;
  Groups groups;
  int64_t correction;
  int64_t* count;
  A *total, *mean, *var;
};

// Moments of every segment and channel.
struct Stored {
  const Moments* at;
  __device__ __forceinline__ Moments load(int64_t i) const { return at[i]; }
};

// One position per image and channel: x itself.
template <typename T>
struct Single {
  const T* at;
  __device__ __forceinline__ Moments load(int64_t i) const { return {static_cast<double>(widen(at[i])), 0}; }
};

template <typename Source, typename A>
__global__ void __launch_bounds__(kMostThreads, 1) merge_kernel(const Source source, const MergeTask<A> task) {
  __shared__ double room[3][kMostThreads / 32][32];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x / task.tiles, first = group * task.step;
  const int64_t channel = static_cast<int64_t>(blockIdx.x % task.tiles) * 32 + lane;
  const bool inside = channel < task.channels && task.positions > 0;
  double images = 0, weights = 0;
  // Calls `add(weight, samples, moments)` for the segments of the group that this warp has.
  const auto walk = [&](const auto& add) {
    for (int64_t base = warp * kAhead; base < task.segments; base += warps * kAhead) {
      bool chosen = lane < kAhead && base + lane < task.segments;
      double weight = 1, samples = 0;
      if (chosen) {
        const int64_t segment = first + base + lane;
        const int64_t image = task.parts == 1 ? segment : task.by_parts.quotient(segment, task.small);
        const int64_t index = segment - image * task.parts;
        if (task.labels != nullptr) chosen = task.labels[image] == group;
        if (chosen && task.weights != nullptr) weight = task.weights[image];
        chosen &= weight != 0;
        samples = static_cast<double>(part_length(task.positions, task.part, index));
        images += chosen && index == 0;
        weights += chosen && index == 0 ? weight : 0;
      }
      const unsigned bits = __ballot_sync(kFullWarp, chosen);
      if (bits == 0) continue;
      Moments found[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (inside && (bits >> j & 1u)) found[j] = source.load((first + base + j) * task.channels + channel);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const double of = __shfl_sync(kFullWarp, weight, j), length = __shfl_sync(kFullWarp, samples, j);
        if (inside && (bits >> j & 1u)) add(of, of * length, found[j]);
      }
    }
  };
  // Over the warps, for every thread.
  const auto over_warps = [&](double (*values)[32], int place) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += values[w][place];
    return sum;
  };
  double sum = 0, samples = 0;
  walk([&](double, double share, const Moments& found) {
    sum += share * found.mean;
    samples += share;
  });
  room[0][warp][lane] = sum;
  room[1][warp][lane] = samples;
  images = lane_sum(images, 32);
  weights = lane_sum(weights, 32);
  if (lane < 2) room[2][warp][lane] = lane == 0 ? images : weights;
  __syncthreads();
  samples = over_warps(room[1], lane);
  const double mean = over_warps(room[0], lane) / samples;
  const double counted = over_warps(room[2], 0), total = over_warps(room[2], 1);
  double squares = 0;
  walk([&](double weight, double share, const Moments& found) {
    const double d = found.mean - mean;
    squares += weight * found.squares + share * (d * d);
  });
  __syncthreads();
  room[0][warp][lane] = squares;
  __syncthreads();
  if (warp != 0) return;
  squares = over_warps(room[0], lane);
  const bool empty = task.groups == Groups::kClasses && counted == 0;
  if (task.groups == Groups::kClasses && channel == 0) {
    task.count[group] = static_cast<int64_t>(counted);
    task.total[group] = static_cast<A>(total);
  }
  if (channel >= task.channels) return;
  const double divisor = samples - static_cast<double>(task.correction);
  const double var = divisor > 0 ? squares / divisor : std::numeric_limits<double>::quiet_NaN();
  task.mean[group * task.channels + channel] = static_cast<A>(empty ? 0 : mean);
  task.var[group * task.channels + channel] = static_cast<A>(empty ? 0 : var);
}

template <typename Source, typename A>
void run(const Source& source, const Merge& merge, cudaStream_t stream) {
  MergeTask<A> task{};
  const int64_t groups = merge.groups == Groups::kAll       ? 1
                         : merge.groups == Groups::kClasses ? merge.classes
                                                            : merge.images;
  task.segments = (merge.groups == Groups::kImages ? 1 : merge.images) * merge.parts;
  task.step = merge.groups == Groups::kImages ? merge.parts : 0;
  task.channels = merge.channels;
  task.positions = merge.positions;
  task.part = merge.part;
  task.parts = static_cast<uint32_t>(merge.parts);
  task.by_parts = Divider(merge.parts);
  task.small = merge.images * merge.parts < int64_t(1) << 31;
  // Counts are wanted even where there are no channels.
  task.tiles = static_cast<uint32_t>(std::max<int64_t>(blocks_of(merge.channels, 32), 1));
  task.labels = merge.labels;
  task.weights = static_cast<const A*>(merge.weights);
  task.groups = merge.groups;
  task.correction = merge.correction;
  task.count = merge.count;
  task.total = static_cast<A*>(merge.total);
  task.mean = static_cast<A*>(merge.mean);
  task.var = static_cast<A*>(merge.var);
  // A warp takes kAhead segments at a time.
  const unsigned threads = task.segments > 256 ? kMostThreads : task.segments > 32 ? 256 : 128;
  launch(merge_kernel<Source, A>, groups * task.tiles, threads, stream, source, task);
}

}  // namespace

void launch_merge(Element element, const Merge& merge, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    if (merge.x != nullptr) return run<Single<T>, A>({static_cast<const T*>(merge.x)}, merge, stream);
    run<Stored, A>({merge.moments}, merge, stream);
  });
}

}  // namespace clusterq
