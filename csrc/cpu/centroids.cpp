// nearest_centroid on the CPU: a float32 search with a bound on its error, float64 for the rows it cannot decide.
//
// A row whose best score leads by more than twice the largest error any of its scores may carry (centroids_codebook.h)
// is decided. Otherwise every centroid whose score may reach the best is measured as sum (x - c)^2 in float64, in the
// order of d.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "centroids_codebook.h"

namespace clusterq {
namespace centroids {
namespace {

struct Found {
  float best, second;
  int32_t id;
};

// The inner loops of one instruction set.
struct Level {
  int lanes, width;
  size_t state_bytes;
  void (*search)(const Book&, const float*, int64_t, void*, Found*);
  void (*score)(const Book&, const float*, float*);
  void (*widen_bfloat16)(const void*, int64_t, float*);
  void (*widen_half)(const void*, int64_t, float*);
  float (*centre)(const float*, const float*, int64_t, float*);
  double (*distance)(const float*, const float*, int64_t);
  void (*search_double)(const double* const[4], int64_t, const double*, int64_t, double*, int64_t*);
};

#define CLUSTERQ_LEVEL portable
#define CLUSTERQ_LANES 4
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_LANES

#if defined(CLUSTERQ_X86) && !defined(__clang__)
#define CLUSTERQ_X86_LEVELS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CLUSTERQ_LEVEL avx2
#define CLUSTERQ_LANES 8
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_LANES
#pragma GCC pop_options

// GCC 12 takes the undefined pass-through operand of its own unmasked AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define CLUSTERQ_LEVEL avx512
#define CLUSTERQ_LANES 16
#include "centroids_kernel.h"
#undef CLUSTERQ_LEVEL
#undef CLUSTERQ_LANES
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

const Level& current_level() {
#ifdef CLUSTERQ_X86_LEVELS
  if (cpu_level() == CpuLevel::kAvx512) return avx512::level;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::level;
#endif
  return portable::level;
}

// [rows, dim] of a 16-bit dtype as float32; float32 stays where it is.
const float* widened(const Level& level, ScalarType dtype, const void* values, int64_t rows, int64_t dim,
                     Scratch<float>& memory) {
  if (dtype == ScalarType::Float) return static_cast<const float*>(values);
  float* target = memory.reserve(rows * dim);
  const auto widen_row = dtype == ScalarType::Half ? level.widen_half : level.widen_bfloat16;
  widen_row(values, rows * dim, target);
  return target;
}

// Nearest centroids of `count` rows.
class Searcher {
 public:
  Searcher(const Level& level, const Codebook& codebook, ScalarType dtype, int64_t clusters, int64_t dim)
      : level_(level), codebook_(codebook), dtype_(dtype), clusters_(clusters), dim_(dim) {
    // Blocks of rows small enough for L1 while all centroids pass by, larger when the centroids come from beyond L2.
    const int64_t bytes = clusters * dim * 4 <= (512 << 10) ? (24 << 10) : (256 << 10);
    block_ = std::clamp<int64_t>(bytes / (4 * dim) / 12 * 12, 12, 1536);
    centred_.reserve((block_ + 12) * dim);
    std::fill_n(centred_.get(), (block_ + 12) * dim, 0.0f);
    state_.reserve((block_ + 12) * static_cast<int64_t>(level.state_bytes));
    found_.resize(block_);
    norm_.resize(block_);
  }

  void run(const void* x, int64_t count, int64_t* index, float* distance) {
    const int64_t element = dtype_ == ScalarType::Float ? 4 : 2;
    for (int64_t n = 0; n < count; n += block_) {
      const int64_t rows = std::min(block_, count - n);
      const char* source = static_cast<const char*>(x) + n * dim_ * element;
      search_block(widened(level_, dtype_, source, rows, dim_, wide_), rows, index + n, distance + n);
    }
  }

 private:
  void search_block(const float* x, int64_t rows, int64_t* index, float* distance) {
    for (int64_t n = 0; n < rows; n++) {
      const double squares = level_.centre(x + n * dim_, codebook_.centre(), dim_, centred_.get() + n * dim_);
      // 1.01 and the added constant cover the float32 summation, also of squares below its range
      norm_[n] = std::sqrt(squares * 1.01 + static_cast<double>(dim_) * 0x1p-120);
    }
    level_.search(codebook_.book(), centred_.get(), rows, state_.get(), found_.data());
    for (int64_t n = 0; n < rows; n++) {
      const Found& found = found_[n];
      const double lead = static_cast<double>(found.best) - static_cast<double>(found.second);
      const bool decided = codebook_.magnitude(norm_[n]) < kLargest && lead > 2 * codebook_.error(norm_[n]);
      index[n] = decided ? found.id : resolve(x + n * dim_, centred_.get() + n * dim_, norm_[n], found);
      const bool none = index[n] < 0;
      distance[n] = none ? std::numeric_limits<float>::quiet_NaN()
                         : static_cast<float>(level_.distance(x + n * dim_, codebook_.row(index[n]), dim_));
    }
  }

  int64_t resolve(const float* x, const float* centred, double norm, const Found& found) {
    for (int64_t d = 0; d < dim_; d++) {
      if (std::isnan(x[d])) return -1;
    }
    if (!(codebook_.magnitude(norm) < kLargest)) return codebook_.measure(x, [](int64_t) { return true; });
    float* scores = scores_.reserve((clusters_ + level_.width - 1) / level_.width * level_.width);
    level_.score(codebook_.book(), centred, scores);
    const double reach = scores[found.id] - codebook_.error(norm, found.id);
    return codebook_.measure(x, [&](int64_t k) {
      return scores[k] > -std::numeric_limits<float>::infinity() && scores[k] + codebook_.error(norm, k) >= reach;
    });
  }

  const Level& level_;
  const Codebook& codebook_;
  ScalarType dtype_;
  int64_t clusters_, dim_, block_;
  Scratch<float> centred_, wide_, scores_;
  Scratch<char> state_;
  std::vector<Found> found_;
  std::vector<double> norm_;
};

constexpr int64_t kShard = 1536;

void search_float(const Level& level, const char* x, ScalarType x_dtype, const char* c, ScalarType c_dtype,
                  int64_t rows, int64_t clusters, int64_t dim, int64_t* index, float* distance) {
  Scratch<float> wide;
  Codebook codebook(level.lanes, level.width, clusters, dim);
  codebook.pack(widened(level, c_dtype, c, clusters, dim, wide));
  const int64_t bytes = dim * (x_dtype == ScalarType::Float ? 4 : 2);
  torch::stable::parallel_for(0, (rows + kShard - 1) / kShard, 1, [&](int64_t begin, int64_t end) {
    Searcher searcher(level, codebook, x_dtype, clusters, dim);
    const int64_t first = begin * kShard;
    searcher.run(x + first * bytes, std::min(end * kShard, rows) - first, index + first, distance + first);
  });
}

void search_float64(const Level& level, const double* x, const double* c, int64_t rows, int64_t clusters, int64_t dim,
                    int64_t* index, double* distance) {
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
      double lowest[4];
      int64_t id[4];
      for (int64_t r = 0; r < 4; r++) row[r] = x + (q * 4 + std::min(r, count - 1)) * dim;
      level.search_double(row, dim, panels, groups, lowest, id);
      std::copy_n(lowest, count, distance + q * 4);
      std::copy_n(id, count, index + q * 4);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> nearest(const Tensor& x_any, const Tensor& centroids_any) {
  CLUSTERQ_CHECK(x_any.dim() == 3 && centroids_any.dim() == 3, "x and centroids must be [B, N, D] and [B, K, D]");
  const Tensor x = packed(x_any);
  const Tensor centroids = packed(centroids_any);
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2), clusters = centroids.size(1);
  const ScalarType x_dtype = x.scalar_type(), c_dtype = centroids.scalar_type();
  const bool wide = x_dtype == ScalarType::Double;
  CLUSTERQ_CHECK(centroids.size(0) == batch && centroids.size(2) == dim, "x and centroids differ in B or D");
  CLUSTERQ_CHECK(clusters >= 1 && clusters < (int64_t{1} << 30) && dim >= 1, "wanted 1 <= K < 2^30 and D >= 1");
  CLUSTERQ_CHECK(wide == (c_dtype == ScalarType::Double), "float64 goes with float64 only");
  for_floating(x_dtype, "x", [](auto, auto) {});
  for_floating(c_dtype, "centroids", [](auto, auto) {});
  Tensor index = torch::stable::new_empty(x, {batch, rows}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, {batch, rows}, wide ? ScalarType::Double : ScalarType::Float);
  const Level& level = current_level();
  const char* x_data = static_cast<const char*>(x.const_data_ptr());
  const char* c_data = static_cast<const char*>(centroids.const_data_ptr());
  int64_t* index_data = static_cast<int64_t*>(index.mutable_data_ptr());
  char* distance_data = static_cast<char*>(distance.mutable_data_ptr());
  const int64_t x_bytes = rows * dim * static_cast<int64_t>(x.element_size());
  const int64_t c_bytes = clusters * dim * static_cast<int64_t>(centroids.element_size());
  const auto one = [&](int64_t b) {
    if (wide) {
      search_float64(level, reinterpret_cast<const double*>(x_data + b * x_bytes),
                     reinterpret_cast<const double*>(c_data + b * c_bytes), rows, clusters, dim, index_data + b * rows,
                     reinterpret_cast<double*>(distance_data) + b * rows);
    } else {
      search_float(level, x_data + b * x_bytes, x_dtype, c_data + b * c_bytes, c_dtype, rows, clusters, dim,
                   index_data + b * rows, reinterpret_cast<float*>(distance_data) + b * rows);
    }
  };
  if (rows == 0) return {index, distance};
  // Many small problems run side by side, each on one thread; large ones one after the other, each on all threads.
  if (batch > 1 && rows * clusters * dim < (int64_t{1} << 22)) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) one(b);
    });
  } else {
    for (int64_t b = 0; b < batch; b++) one(b);
  }
  return {index, distance};
}

}  // namespace centroids
}  // namespace clusterq

namespace {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> nearest_centroid(torch::stable::Tensor x,
                                                                          torch::stable::Tensor centroids) {
  return clusterq::centroids::nearest(x, centroids);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) { m.impl("nearest_centroid", TORCH_BOX(&nearest_centroid)); }
