// Statistics of one image and channel each, of several x, on CUDA: one launch for up to kMost of them.
#include "bn_stats_planes.h"
#include "bn_stats_rows.h"

namespace clusterq {
namespace {

template <typename T, typename A>
struct Entry {
  Task<T, A> task;
  uint32_t first_block;
  Walk walk;
  bool wide;
};

// A table of this many fits into the 4 KB of parameters that every launch may have.
constexpr int kMost = 26;

template <typename T, typename A>
struct Table {
  Entry<T, A> entries[kMost];
  int count;
};
static_assert(sizeof(Table<double, double>) <= 4096);

template <typename T, typename A>
__global__ void __launch_bounds__(kStatisticsThreads, 4) list_kernel(const __grid_constant__ Table<T, A> table) {
  const Entry<T, A>& entry = table.entries[find_entry(table.entries, table.count, blockIdx.x)];
  const unsigned block = blockIdx.x - entry.first_block;
  const Norm<A> none{};
  switch (entry.walk) {
    case Walk::kPacks:
      return packed_planes<false>(entry.task, none, block);
    case Walk::kSlab:
      return slab_planes<false>(entry.task, none, block);
    case Walk::kBlock:
      return large_plane<false>(entry.task, none, block);
    case Walk::kRows:
      return entry.wide ? rows<false, kWide<T>, 4>(entry.task, none, block)
                        : rows<false, 1, 4>(entry.task, none, block);
  }
}

}  // namespace

void launch_statistics_list(Element element, const Listed* entries, int64_t count, void* mean, void* var,
                            int64_t stride, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    Table<T, A> table{};
    int64_t blocks = 0;
    const auto flush = [&] {
      if (blocks > 0) launch(list_kernel<T, A>, blocks, kStatisticsThreads, stream, table);
      table.count = 0;
      blocks = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      const Listed& listed = entries[i];
      const Samples& samples = listed.samples;
      StatisticsPlan plan = plan_statistics(sizeof(T), samples, aligned(listed.x), false);
      // Nothing merges parts here: an image and channel stays whole.
      plan.blocks /= plan.parts;
      plan.parts = 1;
      plan.part = samples.positions;
      if (table.count == kMost || blocks + plan.blocks >= int64_t(1) << 31) flush();
      StatisticsTarget target;
      target.mean = static_cast<A*>(mean) + listed.first_column;
      target.var = static_cast<A*>(var) + listed.first_column;
      target.stride = stride;
      Entry<T, A>& entry = table.entries[table.count++];
      entry.task = task_of<T, A>(listed.x, nullptr, samples, plan, target);
      entry.first_block = static_cast<uint32_t>(blocks);
      entry.walk = plan.walk;
      entry.wide = plan.width > 1;
      blocks += plan.blocks;
    }
    flush();
  });
}

}  // namespace clusterq
