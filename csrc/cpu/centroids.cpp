// nearest_centroid on the CPU: a search in float32, or with products of bfloat16 where the processor multiplies two of
// them in the time of one float, and a bound on the error of its scores (centroids_search.h).
//
// A row keeps every pair of centroids, the two that shared a lane of a register, whose higher score lies within twice
// the largest error of the best one. Mostly that is one pair. Distances decide, sum (x - c)^2 in float64; where these
// are as good as equal, added in the order of d.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "centroids_searcher.h"

namespace clusterq {
namespace centroids {
namespace {

#define CLUSTERQ_LEVEL portable
#define CLUSTERQ_FLOATS 4
#define CLUSTERQ_PAIRS 0
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_FLOATS

#if defined(CLUSTERQ_X86) && !defined(__clang__)
#define CLUSTERQ_X86_LEVELS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CLUSTERQ_LEVEL avx2
#define CLUSTERQ_FLOATS 8
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_FLOATS
#pragma GCC pop_options

// GCC 12 takes the undefined pass-through operand of its own unmasked AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define CLUSTERQ_LEVEL avx512
#define CLUSTERQ_FLOATS 16
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_PAIRS
#pragma GCC target("avx512bf16")
#define CLUSTERQ_LEVEL avx512_bf16
#define CLUSTERQ_PAIRS 1
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_FLOATS
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif
#undef CLUSTERQ_PAIRS

const Level& float_level() {
#ifdef CLUSTERQ_X86_LEVELS
  if (cpu_level() == CpuLevel::kAvx512) return avx512::level;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::level;
#endif
  return portable::level;
}

// Products of bfloat16, null where the processor has none.
const Level* pair_level() {
#ifdef CLUSTERQ_X86_LEVELS
  if (cpu_level() == CpuLevel::kAvx512 && has_avx512_bf16()) return &avx512_bf16::level;
#endif
  return nullptr;
}

// Whether few enough candidates are left to a plan with products of bfloat16, by some of the rows.
bool suffices(const Plan& plan, const Points& points, int64_t rows) {
  constexpr int64_t kSamples = 4 * kMostRows;
  if (rows < 32 * kSamples) return true;
  Searcher searcher(plan);
  Points sample = points;
  sample.row_stride *= rows / kSamples;
  searcher.run(sample, 0, kSamples, {});
  // Such a row costs about as much as four others.
  return searcher.crowded() * 8 < kSamples;
}

// The search that fits the numbers.
Plan plan_for(const Level& plain, const Level* pairs, const Book& book, Search search, const Points& points,
              int64_t rows, int64_t dim) {
  // In few dimensions centroids lie too close for 16 bits.
  if (pairs != nullptr && dim > 4) {
    Plan plan(*pairs, book, search);
    if (suffices(plan, points, rows)) return plan;
  }
  return Plan(plain, book, search);
}

// So few numbers that preparing a search would take longer than the distances.
void search_tiny(const Points& points, const char* c, ScalarType c_dtype, int64_t rows, int64_t clusters, int64_t dim,
                 Search search, const Output& output) {
  const Level& level = float_level();
  std::vector<float> values(clusters * dim), row(dim);
  widen(level, c_dtype, c, 1, clusters * dim, values.data());
  for (int64_t n = 0; n < rows; n++) {
    widen(level, points.dtype, points.row(n), points.stride, dim, row.data());
    int64_t index[2];
    nearest_by_distance(row.data(), values.data(), clusters, dim, nullptr, search.count, index);
    for (int w = 0; w < search.count; w++) {
      const int64_t k = index[w];
      output.set(n * search.count + w, k, k < 0 ? 0 : level.measure(row.data(), &values[k * dim], dim));
    }
    if (output.undecided != nullptr) output.undecided[n] = false;
  }
}

void search_float(const Points& points, const char* c, ScalarType c_dtype, int64_t rows, int64_t clusters, int64_t dim,
                  Search search, const Output& output) {
  const Level &plain = float_level(), *pairs = pair_level();
  Scratch<float> wide;
  const float* values = reinterpret_cast<const float*>(c);
  if (c_dtype != ScalarType::Float) {
    widen(plain, c_dtype, c, 1, clusters * dim, wide.reserve(clusters * dim));
    values = wide.get();
  }
  const Book book(plain, pairs == nullptr ? plain : *pairs, values, clusters, dim, search.count > 1);
  const Plan plan = plan_for(plain, pairs, book, search, points, rows, dim);
  // about 0.1 ms of work: a row takes some 100 cycles besides its products
  const int64_t grain = std::max<int64_t>(kMostRows, (int64_t{1} << 23) / (clusters * dim + 4096));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { Searcher(plan).run(points, begin, end, output); });
}

void search_float64(const double* x, const double* c, int64_t rows, int64_t clusters, int64_t dim, int wanted,
                    int64_t* index, double* distance) {
  const Level& level = float_level();
  const int64_t groups = (clusters + 7) / 8;
  Scratch<double> packed;
  double* panels = packed.reserve(groups * dim * 8);
  for (int64_t k = 0; k < groups * 8; k++) {
    // a NaN never wins, so it serves as padding
    for (int64_t d = 0; d < dim; d++) {
      const double value = k < clusters ? c[k * dim + d] : std::numeric_limits<double>::quiet_NaN();
      panels[(k / 8 * dim + d) * 8 + k % 8] = value;
    }
  }
  torch::stable::parallel_for(0, (rows + 3) / 4, 64, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; q++) {
      const int64_t count = std::min<int64_t>(4, rows - q * 4);
      const double* row[4];
      double lowest[8];
      int64_t id[8];
      for (int64_t r = 0; r < 4; r++) row[r] = x + (q * 4 + std::min(r, count - 1)) * dim;
      level.search_double(row, dim, panels, groups, lowest, id, wanted);
      std::copy_n(lowest, count * wanted, distance + q * 4 * wanted);
      std::copy_n(id, count * wanted, index + q * 4 * wanted);
    }
  });
}

void check_pair(const Tensor& x, const Tensor& centroids) {
  CLUSTERQ_CHECK(x.dim() == 3 && centroids.dim() == 3, "x and centroids must be [B, N, D] and [B, K, D]");
  const int64_t clusters = centroids.size(1), dim = x.size(2);
  CLUSTERQ_CHECK(centroids.size(0) == x.size(0) && centroids.size(2) == dim, "x and centroids differ in B or D");
  CLUSTERQ_CHECK(clusters >= 1 && clusters < (int64_t{1} << 30) && dim >= 1, "wanted 1 <= K < 2^30 and D >= 1");
  CLUSTERQ_CHECK((x.scalar_type() == ScalarType::Double) == (centroids.scalar_type() == ScalarType::Double),
                 "float64 goes with float64 only");
  for_floating(x.scalar_type(), "x", [](auto, auto) {});
  for_floating(centroids.scalar_type(), "centroids", [](auto, auto) {});
}

// Outputs have [B, N] elements, those of the indices and distances [B, N, wanted]; any but both of these may be null.
void search_all(const Tensor& x_any, const Tensor& centroids_any, Search search, int64_t* index, void* distance,
                bool* undecided) {
  check_pair(x_any, centroids_any);
  const bool wide = x_any.scalar_type() == ScalarType::Double;
  // Only the direct search in float64 wants its rows one after the other.
  const Tensor x = wide ? packed(x_any) : x_any, centroids = packed(centroids_any);
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2), clusters = centroids.size(1);
  if (rows == 0 || batch == 0) return;
  // Raises here, not in a thread, for a level that does not exist.
  cpu_level();
  const char* x_data = static_cast<const char*>(x.const_data_ptr());
  const char* c_data = static_cast<const char*>(centroids.const_data_ptr());
  const int64_t element = static_cast<int64_t>(x.element_size()), outputs = rows * search.count;
  const int64_t c_bytes = clusters * dim * static_cast<int64_t>(centroids.element_size());
  const auto one = [&](int64_t b) {
    const char* entry = x_data + b * x.stride(0) * element;
    if (wide) {
      search_float64(reinterpret_cast<const double*>(entry), reinterpret_cast<const double*>(c_data + b * c_bytes),
                     rows, clusters, dim, search.count, index + b * outputs,
                     static_cast<double*>(distance) + b * outputs);
      return;
    }
    const Points points = {entry, x.scalar_type(), element, x.stride(1), x.stride(2)};
    const Output output = {index == nullptr ? nullptr : index + b * outputs,
                           distance == nullptr ? nullptr : static_cast<float*>(distance) + b * outputs,
                           undecided == nullptr ? nullptr : undecided + b * rows};
    const auto find = rows * clusters * dim <= 1024 ? search_tiny : search_float;
    find(points, c_data + b * c_bytes, centroids.scalar_type(), rows, clusters, dim, search, output);
  };
  // Many small problems run side by side, each on one thread; large ones one after the other, each on all threads.
  if (batch > 1 && rows * clusters * dim < (int64_t{1} << 22)) {
    const int64_t grain = std::max<int64_t>(1, 16384 / (rows * clusters * dim));
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) one(b);
    });
  } else {
    for (int64_t b = 0; b < batch; b++) one(b);
  }
}

std::tuple<Tensor, Tensor> find(const Tensor& x, const Tensor& centroids, Search search) {
  check_pair(x, centroids);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> shape = {x.size(0), x.size(1)};
  if (search.count > 1) shape.push_back(search.count);
  Tensor index = torch::stable::new_empty(x, shape, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, shape, dtype);
  search_all(x, centroids, search, static_cast<int64_t*>(index.mutable_data_ptr()), distance.mutable_data_ptr(),
             nullptr);
  return {index, distance};
}

bool is_exact(const std::string& precision) {
  CLUSTERQ_CHECK(precision == "exact" || precision == "fast", "precision is ", precision, "; wanted exact or fast");
  return precision == "exact";
}

std::tuple<Tensor, Tensor> two_nearest_centroids(Tensor x, Tensor centroids, std::string precision) {
  // With two, candidates have to be told apart by distance in any case.
  is_exact(precision);
  return find(x, centroids, {true, 2});
}

Tensor undecided_rows(Tensor x, Tensor centroids) {
  check_pair(x, centroids);
  Tensor undecided = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Bool);
  bool* flags = static_cast<bool*>(undecided.mutable_data_ptr());
  if (x.scalar_type() == ScalarType::Double) {
    std::fill_n(flags, undecided.numel(), false);
  } else {
    search_all(x, centroids, {true, 1}, nullptr, nullptr, flags);
  }
  return undecided;
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_centroid(Tensor x, Tensor centroids, std::string precision) {
  return find(x, centroids, {is_exact(precision), 1});
}

}  // namespace centroids
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("nearest_centroid", TORCH_BOX(&clusterq::centroids::nearest_centroid));
  m.impl("two_nearest_centroids", TORCH_BOX(&clusterq::centroids::two_nearest_centroids));
  m.impl("undecided_rows", TORCH_BOX(&clusterq::centroids::undecided_rows));
}
