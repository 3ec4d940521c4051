// How the CUDA kernels of the BatchNorm statistics divide work among blocks, and how they merge moments: host code.
#include <cstdio>
#include <initializer_list>
#include <random>
#include <vector>

#include "cuda/bn_stats_plan.h"
#include "cuda/moments.h"

using namespace clusterq;

namespace {

int failures = 0;
int64_t checks = 0;

void expect(bool ok, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  ++checks;
  if (!ok && ++failures < 20)
    std::printf("%s: %lld %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b),
                static_cast<long long>(c));
}

// Four blocks to each of 132 multiprocessors.
void many_blocks(const Samples& x, int bytes) {
  for (const bool merged : {false, true}) {
    const StatisticsPlan plan = plan_statistics(bytes, x, true, merged);
    expect(plan.blocks >= 4 * 132, "blocks", plan.blocks, x.channels, x.positions);
    expect(plan.walk != Walk::kRows || plan.width == 16 / bytes, "width", plan.width, x.channels);
  }
  const BackwardPlan backward = plan_backward(bytes, x, true);
  expect(backward.blocks >= 4 * 132, "blocks backward", backward.blocks, x.channels, x.positions);
  expect(backward.width == 16 / bytes, "width backward", backward.width, x.channels, x.positions);
  const ParameterPlan parameters = plan_parameters(bytes, x, true);
  expect(parameters.blocks >= 4 * 132, "blocks of parameters", parameters.blocks, x.channels, x.positions);
  expect(parameters.width == 16 / bytes, "width of parameters", parameters.width, x.channels, x.positions);
}

void typical_shapes() {
  for (const int bytes : {2, 4}) {
    for (const bool rows : {false, true})
      for (const Samples& x : {Samples{512, 16, 1024, rows}, Samples{512, 64, 64, rows}, Samples{64, 64, 3136, rows},
                               Samples{64, 512, 49, rows}})
        many_blocks(x, bytes);
    // Instances and, without their images, the batch of [8192, 512].
    const StatisticsPlan instances = plan_statistics(bytes, {8192, 512, 1, false}, true, false);
    expect(instances.blocks >= 4 * 132, "blocks", instances.blocks);
    many_blocks({1, 512, 8192, true}, bytes);
  }
}

// Every position of every plane, or row and column, falls to one thread, and what shared memory holds suffices.
void covered(const Samples& x, int bytes, bool is_aligned, bool merged) {
  const StatisticsPlan plan = plan_statistics(bytes, x, is_aligned, merged);
  const int64_t planes = x.images * x.channels, wide = 16 / bytes;
  expect(plan.part > 0 && plan.parts == blocks_of(x.positions, plan.part), "parts", plan.parts, plan.part, x.positions);
  int64_t positions = 0;
  for (int64_t i = 0; i < plan.parts; ++i) positions += part_length(x.positions, plan.part, i);
  expect(positions == x.positions, "positions", positions, x.positions, plan.part);
  expect(plan.lanes >= 1 && plan.lanes <= 32 && (plan.lanes & (plan.lanes - 1)) == 0, "lanes", plan.lanes);
  switch (plan.walk) {
    case Walk::kPacks:
      expect(x.positions % wide == 0 && x.positions / wide <= 32 / wide * plan.lanes, "packs", x.positions, plan.lanes);
      expect(plan.blocks * (kStatisticsThreads / plan.lanes) >= planes, "planes", plan.blocks, planes);
      break;
    case Walk::kSlab: {
      const int64_t groups = kStatisticsThreads / plan.lanes;
      expect(plan.slab * x.positions <= kSmallPlane * std::max<int64_t>(wide, kStatisticsThreads / 32), "slab",
             plan.slab, x.positions, bytes);
      expect(plan.slab % wide == 0 && plan.slab % groups == 0, "groups", plan.slab, groups);
      expect(plan.blocks * plan.slab >= planes && (plan.blocks - 1) * plan.slab < planes, "planes", plan.blocks);
      break;
    }
    case Walk::kBlock:
      expect(plan.blocks == planes * plan.parts, "blocks", plan.blocks, planes, plan.parts);
      break;
    case Walk::kRows:
      expect(plan.tiles * plan.lanes * plan.width >= x.channels, "columns", plan.tiles, plan.lanes, x.channels);
      expect(plan.lanes * plan.width <= kStatisticsThreads, "owners", plan.lanes, plan.width);
      expect(plan.blocks == x.images * plan.tiles * plan.parts, "blocks", plan.blocks, plan.tiles, plan.parts);
      break;
  }
  const BackwardPlan backward = plan_backward(bytes, x, is_aligned);
  const int64_t height = kStatisticsThreads / backward.lanes * backward.held;
  const int64_t reached = backward.rows ? backward.blocks / backward.tiles * height * x.channels
                                        : backward.blocks * kStatisticsThreads * backward.width * backward.held;
  expect(reached >= x.numel(), "elements backward", reached, x.numel());
  expect(backward.rows || backward.width == 1 || x.positions >= backward.width, "pack of three planes", x.positions);
  const ParameterPlan sums = plan_parameters(bytes, x, is_aligned);
  expect(sums.rows * sums.columns == x.numel() && sums.splits == blocks_of(sums.rows, sums.part), "rows", sums.rows);
  expect(sums.tiles * sums.lanes * sums.width >= sums.columns, "columns", sums.tiles, sums.lanes, sums.columns);
  expect(sums.part <= kStatisticsThreads / sums.lanes * kSummedRows, "rows of a thread", sums.part, sums.lanes);
}

void any_shape() {
  std::mt19937_64 random_bits(3);
  const auto up_to = [&](int64_t most) {
    return 1 + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most));
  };
  for (int i = 0; i < 20000; ++i) {
    const int64_t positions = up_to(int64_t(1) << up_to(20));
    const Samples x{up_to(int64_t(1) << up_to(12)), up_to(int64_t(1) << up_to(12)), positions, i % 2 != 0};
    if (x.numel() > int64_t(1) << 40) continue;
    for (const int bytes : {2, 4, 8})
      for (const bool is_aligned : {true, false})
        for (const bool merged : {true, false}) covered(x, bytes, is_aligned, merged);
  }
}

// Chunks of data far from zero, merged one by one, against two passes.
void merges() {
  std::mt19937_64 random_bits(7);
  std::normal_distribution<double> normal;
  for (const double offset : {0.0, 1e5, -1e8}) {
    std::vector<double> data(5000);
    for (double& x : data) x = normal(random_bits) + offset;
    double mean = 0, squares = 0;
    for (const double x : data) mean += (x - offset) / 5000;
    mean += offset;
    for (const double x : data) squares += (x - mean) * (x - mean);
    Moments all{0, 0};
    for (size_t start = 0; start < data.size();) {
      const size_t end = std::min(data.size(), start + 1 + random_bits() % 300);
      // As a kernel has it: a shift rounded to float32.
      float shift = 0;
      for (size_t i = start; i < end; ++i) shift += static_cast<float>(data[i]) / static_cast<float>(end - start);
      double first = 0, second = 0;
      for (size_t i = start; i < end; ++i) {
        first += data[i] - shift;
        second += (data[i] - shift) * (data[i] - shift);
      }
      const double count = static_cast<double>(end - start), before = static_cast<double>(start);
      merge_moments(all, before, shifted_moments(shift, first, second, 1 / count), count / (before + count));
      start = end;
    }
    expect(std::abs(all.mean - mean) < 1e-12 * (1 + std::abs(offset)), "mean", static_cast<int64_t>(offset));
    expect(std::abs(all.squares - squares) < 1e-6 * squares, "squares", static_cast<int64_t>(offset));
  }
}

}  // namespace

int main() {
  typical_shapes();
  any_shape();
  merges();
  std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
  return failures != 0;
}
