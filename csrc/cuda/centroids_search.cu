// The search: scores x'.c' - |c'|^2/2 of tiles of 128 rows and 64 centroids on tensor cores, and of every row the best
// of them in registers. Nothing of the size N * K is written.
//
// Every centroid's score is the same sequence of instructions whatever its place, so copies of a centroid tie to the
// bit and the lowest index wins.
#include "centroids_device.h"
#include "centroids_leaders.h"
#include "centroids_mma.h"

namespace clusterq {
namespace {

// Panels of 32 values of D: of the rows of a block, and of a tile of centroids.
constexpr int kRowPanel = kTileRows * kTileDepth, kColumnPanel = kTileColumns * kTileDepth;
// Room for 4 row panels: all of x where D is small, else two parts of one chunk and of the next.
constexpr int kRowPanels = 4;

template <typename T>
struct SearchTask {
  Rows<T> x;
  Book book;
  // As in SearchPlan; narrow numbers, of which every thread keeps several.
  int32_t rows, dim, tiles, chunks, part, parts, row_tiles;
  void* leaders;
};

struct Rooms {
  uint16_t *rows, *columns;
};

// Eight values of a row from d on, 0 past the end.
template <typename T>
__device__ __forceinline__ void load_values(T (&values)[8], const T* row, int d, int dim, bool wide) {
  if (wide && d + 8 <= dim) {
    constexpr int kPack = kWide<T>;
#pragma unroll
    for (int i = 0; i < 8; i += kPack) {
      const Pack<T, kPack> pack = load_pack<kPack>(row + d + i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) values[i + j] = pack.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d + i < dim ? row[d + i] : Narrow<T>::of(0.0f);
  }
}

// One chunk of `rows` rows, relative to the centre and in parts, or as it is.
template <bool kRaw, typename T>
__device__ __forceinline__ void load_rows(const SearchTask<T>& t, const T* x, const float* centre, int rows, int chunk,
                                          uint16_t* to) {
  // Not unrolled: beside the sums of a block there are no registers for it.
#pragma unroll 1
  for (int place = threadIdx.x; place < kTileRows * 4; place += kSearchThreads) {
    const int row = place / 4, unit = place % 4, d = chunk * kTileDepth + unit * 8;
    const bool inside = row < rows && d < t.dim;
    T values[8];
    if (inside) {
      load_values(values, x + row * t.x.row_stride, d, t.dim, t.x.wide);
    } else {
#pragma unroll
      for (T& value : values) value = Narrow<T>::of(0.0f);
    }
    uint16_t* const at = to + panel_place(row, unit);
    if constexpr (kRaw) {
      uint32_t words[4];
      memcpy(words, values, sizeof(words));
      store_unit(at, words);
    } else {
      float relative[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) relative[i] = inside && d + i < t.dim ? widen(values[i]) - centre[d + i] : 0.0f;
      const SplitUnit parts = split_unit(relative);
      store_unit(at, parts.high);
      store_unit(at + kRowPanel, parts.middle);
    }
  }
}

// A warp's sums over `steps` times 16 values of D: [2 x 16 rows] x [kPairs x 16 centroids].
template <bool kRaw, bool kHalf, int kPairs>
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][2 * kPairs][4], const uint16_t* rows,
                                               const uint16_t* columns, int steps) {
  constexpr int kParts = kRaw ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t a[kParts][2][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices(a[part][m],
                      rows + part * kRowPanel + panel_place(warp * 32 + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t b[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        load_matrices(b[part], columns + part * kColumnPanel +
                                   panel_place(pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      // Which parts are multiplied: both first, first and second, second and first.
#pragma unroll
      for (int product = 0; product < (kRaw ? 1 : 3); ++product)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            multiply_add_tile<kHalf>(sums[m][pair * 2 + n], a[product == 2 ? kParts - 1 : 0][m],
                                     b[product == 1 ? kParts - 1 : 0][n * 2],
                                     b[product == 1 ? kParts - 1 : 0][n * 2 + 1]);
    }
  }
}

template <bool kRaw, int kKept, int kPairs, typename T>
__device__ __forceinline__ void search_tile(const SearchTask<T>& t, const Rooms& room, int64_t b, int first, int part) {
  constexpr bool kHalf = kRaw && std::is_same_v<T, __half>;
  constexpr int kParts = kRaw ? 1 : 2;
  const int lane = threadIdx.x % 32, first_tile = part * t.part, rows = t.rows - first;
  const int tiles = t.tiles - first_tile < t.part ? t.tiles - first_tile : t.part;
  const bool resident = t.chunks * kParts <= kRowPanels;
  const T* const x = t.x.at(b, first);
  const float* const centre = t.book.centre + b * t.dim;
  // Tiles of all batch entries, each of 8 KiB or more, are fewer than 2^31.
  const int place = static_cast<int>(b) * t.tiles + first_tile;
  const uint16_t* panel = t.book.panels + static_cast<int64_t>(place) * t.chunks * 2 * kColumnPanel + threadIdx.x * 8;
  // Its rows are past the end: it only waits with the others.
  const bool idle = static_cast<int>(threadIdx.x) / 32 * 32 >= rows;
  const auto load_columns = [&](int side) {
#pragma unroll
    for (int i = 0; i < kParts * kColumnPanel; i += kSearchThreads * 8)
      copy_unit(room.columns + side * 2 * kColumnPanel + threadIdx.x * 8 + i, panel + i);
    panel += 2 * kColumnPanel;
  };
  const auto row_room = [&](int side, int chunk) {
    return room.rows + (resident ? chunk * kParts : side * 2) * kRowPanel;
  };

  Leaders<kKept> leaders[4];
  float sums[2][2 * kPairs][4];
  load_columns(0);
  for (int chunk = 0; chunk < (resident ? t.chunks : 1); ++chunk)
    load_rows<kRaw>(t, x, centre, rows, chunk, row_room(0, chunk));
  int chunk = 0, tile = 0;
#pragma unroll 1
  for (int side = 0; tile < tiles; side ^= 1) {
    wait_copies();
    // This stage has come, and nobody reads the one before any more.
    __syncthreads();
    const bool ends = chunk + 1 == t.chunks;
    const int next = ends ? 0 : chunk + 1;
    if (!ends || tile + 1 < tiles) {
      load_columns(side ^ 1);
      if (!resident) load_rows<kRaw>(t, x, centre, rows, next, row_room(side ^ 1, next));
    }
    if (!idle) {
      if (chunk == 0) {
        // Of the first two columns of the thread.
        const float* const offsets = t.book.offsets + static_cast<int64_t>(place + tile) * kTileColumns + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n) {
          const Pack<float, 2> offset = load_pack<2>(offsets + n * 8);
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[e / 4][n][e % 4] = offset.at[e % 2];
        }
      }
      multiply_chunk<kRaw, kHalf, kPairs>(sums, row_room(side, chunk), room.columns + side * 2 * kColumnPanel,
                                          t.dim - chunk * kTileDepth > 16 ? 2 : 1);
      if (ends) {
        // Indices count from the thread's first column of this tile, so that those offered are constants.
#pragma unroll
        for (int r = 0; r < 4; ++r) leaders[r].shift(-kTileColumns);
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int r = 0; r < 4; ++r) leaders[r].offer(sums[r / 2][n][r % 2 * 2 + e], n * 8 + e);
      }
    }
    chunk = next;
    tile += ends;
  }
  if (idle) return;

  Leaders<kKept>* const to = static_cast<Leaders<kKept>*>(t.leaders) + (part * t.x.batch + b) * t.rows + first;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    leaders[r].place((first_tile + tiles - 1) * kTileColumns + lane % 4 * 2);
    // The four lanes that share a row.
    for (int bits = 1; bits < 4; bits *= 2)
      leaders[r].merge(leaders[r].map([&](auto v) { return __shfl_xor_sync(kFullWarp, v, bits); }));
    const int row = static_cast<int>(threadIdx.x) / 32 * 32 + r * 8 + lane / 4;
    if (lane % 4 == 0 && row < rows) to[row] = leaders[r];
  }
}

// kPairs: 4, or 1 where there are at most 16 centroids.
template <int kKept, int kPairs, typename T>
__global__ void __launch_bounds__(kSearchThreads, kKept == 3 ? 2 : 3)
    search_kernel(const __grid_constant__ SearchTask<T> t) {
  alignas(128) __shared__ uint16_t rows[kRowPanels * kRowPanel];
  alignas(128) __shared__ uint16_t columns[2 * 2 * kColumnPanel];
  // Blocks that share rows follow each other.
  const unsigned place = blockIdx.x / t.parts, b = place / t.row_tiles;
  const int part = static_cast<int>(blockIdx.x - place * t.parts);
  const int first = static_cast<int>(place - b * t.row_tiles) * kTileRows;
  if constexpr (sizeof(T) == 2) {
    if (t.book.facts[b].raw != 0) return search_tile<true, kKept, kPairs>(t, {rows, columns}, b, first, part);
  }
  search_tile<false, kKept, kPairs>(t, {rows, columns}, b, first, part);
}

}  // namespace

void launch_search(const CentroidSearch& search, cudaStream_t stream) {
  const int64_t blocks = search.x.batch * search.plan.row_tiles * search.plan.parts;
  for_element(search.x.element, [&](auto x, auto) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      const SearchPlan& plan = search.plan;
      const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
      const SearchTask<T> task{Rows<T>(search.x),      search.book,         narrow(search.x.rows), narrow(search.x.dim),
                               narrow(plan.tiles),     narrow(plan.chunks), narrow(plan.part),     narrow(plan.parts),
                               narrow(plan.row_tiles), search.leaders};
      const auto start = [&](auto narrow_kernel, auto kernel) {
        launch(search.clusters <= 16 ? narrow_kernel : kernel, blocks, kSearchThreads, stream, task);
      };
      if (search.kept == 1) start(search_kernel<1, 1, T>, search_kernel<1, 4, T>);
      if (search.kept == 2) start(search_kernel<2, 1, T>, search_kernel<2, 4, T>);
      if (search.kept == 3) start(search_kernel<3, 1, T>, search_kernel<3, 4, T>);
    }
  });
}

}  // namespace clusterq
