// nearest_centroid on the CPU: a search in float32, or with products of bfloat16 where the processor multiplies two of
// them in the time of one float, and a bound on the error of its scores (centroids_search.h).
//
// A row keeps every centroid whose score lies within twice the largest error of the best one. Mostly that is one
// centroid, which then is the nearest. Otherwise their distances decide, sum (x - c)^2 in float64; where these are as
// good as equal, added in the order of d.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "centroids_book.h"
#include "lanes_avx512.h"

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

// Rows [N, D] of one batch entry as they lie in memory, strides in elements.
struct Points {
  const char* data;
  ScalarType dtype;
  int64_t element, row_stride, stride;

  const char* row(int64_t n) const { return data + n * row_stride * element; }
  bool direct() const { return dtype == ScalarType::Float && stride == 1; }
};

void widen(const Level& level, ScalarType dtype, const void* source, int64_t step, int64_t count, float* target) {
  const auto loop = dtype == ScalarType::Half       ? level.widen_half
                    : dtype == ScalarType::BFloat16 ? level.widen_bfloat16
                                                    : level.widen_float;
  loop(source, step, count, target);
}

// Panels that fit a level-2 cache beside a block of rows are packed once for all threads; others by each thread, as
// many at a time.
constexpr int64_t kShared = 512 << 10, kOwn = 256 << 10;
// Rows that pass by all panels before the next ones come. Few where all panels are at hand.
constexpr int64_t kFew = 2 * kMostRows, kMany = 2048;

// The search as one call runs it: one set of centroids, all rows, one level.
class Plan {
 public:
  Plan(const Level& level, const Book& book, Search search)
      : level(level), book(book), search(search), dim(book.bound(false, true).dim) {
    const int64_t clusters = book.clusters(), width = 2 * level.lanes, panel = Book::bytes(level, width, dim);
    // 16-bit products are for finding candidates only.
    exact = search.exact || level.pairs;
    shared = Book::bytes(level, clusters, dim) <= kShared && clusters <= 4096;
    step = shared ? (clusters + width - 1) / width * width : std::clamp<int64_t>(kOwn / panel, 1, 128) * width;
    if (!shared) return;
    char* target = panels_.reserve(Book::bytes(level, clusters, dim));
    torch::stable::parallel_for(0, (clusters + width - 1) / width, std::max<int64_t>(1, 32768 / (width * dim)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t p = begin; p < end; p++) book.pack(level, p * width, target + p * panel);
                                });
  }

  const char* panels() const { return panels_.get(); }

  const Level& level;
  const Book& book;
  Search search;
  int64_t dim;
  bool exact, shared;
  // centroids at a time
  int64_t step;

 private:
  Scratch<char> panels_;
};

// The rows of one thread.
class Searcher {
 public:
  explicit Searcher(const Plan& plan) : plan_(plan), rows_(plan.shared ? kFew : kMany) {
    const int64_t dim = plan.dim, operands = kMostRows * (dim + kMostWidth);
    std::fill_n(operands_.reserve(operands), operands, 0.0f);
    scores_.reserve(kMostRows * (std::min(plan.step, plan.book.clusters()) / 2 + kMostWidth));
    job_ = {plan.book.values(),
            plan.book.origin(),
            plan.book.left_out(),
            plan.book.clusters(),
            plan.book.bound(plan.level.pairs, plan.exact),
            plan.search.count,
            plan.search.count == 1 && plan.book.apart().empty(),
            [](void* self, const float* x, const Row& row, int64_t number) {
              static_cast<Searcher*>(self)->decide(x, row, number);
            },
            this};
  }

  void run(const Points& points, int64_t begin, int64_t end, const Output& output) {
    const int64_t block = static_cast<int64_t>(rows_.size()), wanted = plan_.search.count;
    for (int64_t n = begin; n < end; n += block) {
      const int64_t count = std::min(block, end - n);
      output_ = {output.index == nullptr ? nullptr : output.index + n * wanted,
                 output.distance == nullptr ? nullptr : output.distance + n * wanted,
                 output.undecided == nullptr ? nullptr : output.undecided + n};
      int64_t stride = points.row_stride;
      const float* x = points.direct() ? reinterpret_cast<const float*>(points.row(n)) : nullptr;
      if (x == nullptr) {
        float* target = wide_.reserve(block * plan_.dim);
        for (int64_t r = 0; r < count; r++) {
          widen(plan_.level, points.dtype, points.row(n + r), points.stride, plan_.dim, target + r * plan_.dim);
        }
        x = target, stride = plan_.dim;
      }
      scan(x, stride, count);
    }
  }

  // Rows with more candidates than are kept.
  int64_t crowded() const { return crowded_; }

 private:
  void scan(const float* x, int64_t stride, int64_t count) {
    const Book& book = plan_.book;
    const int64_t clusters = book.clusters();
    for (int64_t first = 0; first < clusters; first += plan_.step) {
      const int64_t here = std::min(plan_.step, clusters - first);
      const char* operands = plan_.panels();
      if (!plan_.shared) {
        const int64_t width = 2 * plan_.level.lanes, panel = Book::bytes(plan_.level, width, plan_.dim);
        char* target = panels_.reserve(plan_.step / width * panel);
        for (int64_t p = 0; p * width < here; p++) book.pack(plan_.level, first + p * width, target + p * panel);
        operands = target;
      }
      plan_.level.scan(job_, {here, plan_.dim, operands, book.offset(first)}, x, stride, count, first,
                       first + here == clusters, operands_.get(), scores_.get(), rows_.data(), output_);
    }
  }

  void decide(const float* x, const Row& row, int64_t number) {
    int64_t index[2] = {-1, -1};
    const int wanted = plan_.search.count;
    bool alone = false;
    const bool usable = row.count != kMeasure || std::none_of(x, x + plan_.dim, [](float v) { return std::isnan(v); });
    if (usable) alone = choose(x, row, index);
    for (int n = 0; n < wanted; n++) {
      const int64_t k = index[n], place = number * wanted + n;
      if (output_.index != nullptr) output_.index[place] = k;
      if (output_.distance == nullptr) continue;
      output_.distance[place] =
          k < 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(plan_.book.measure(x, k));
    }
    if (output_.undecided != nullptr) output_.undecided[number] = !alone;
  }

  // Whether scores alone were enough.
  bool choose(const float* x, const Row& row, int64_t* index) {
    const Book& book = plan_.book;
    const int wanted = plan_.search.count;
    const bool crowded = row.count == kOverflow;
    crowded_ += crowded;
    found_.clear();
    if (row.count == kMeasure) {
      book.settle(x, nullptr, wanted, index);
      return false;
    }
    if (crowded && plan_.exact) {
      book.rank(x, row.norm, wanted, scores32_, found_);
    } else {
      for (int j = 0; j < (crowded ? kRoom : row.count); j++) {
        const int64_t id = row.candidates[j].id;
        for (const int64_t k : {id, id + plan_.level.lanes}) {
          if (k < book.clusters() && !book.left_out()[k]) found_.push_back(k);
        }
      }
    }
    if (static_cast<int>(found_.size()) < wanted) {
      book.settle(x, nullptr, wanted, index);
      return false;
    }
    distances_.clear();
    for (const int64_t k : found_) distances_.push_back(book.measure(x, k));
    double farthest = reach(wanted);
    for (const int64_t k : book.apart()) {
      if (!book.within(k, row.norm, farthest)) continue;
      found_.push_back(k);
      distances_.push_back(book.measure(x, k));
    }
    // What another order of summation may still bring to the front.
    farthest = reach(wanted) * job_.bound.order;
    int64_t kept = 0;
    for (size_t j = 0; j < found_.size(); j++) {
      if (distances_[j] <= farthest) found_[kept++] = found_[j];
    }
    found_.resize(kept);
    if (kept == 1) {
      index[0] = found_[0];
    } else {
      book.settle(x, &found_, wanted, index);
    }
    return kept == 1 && row.count == 1;
  }

  // The `wanted`-th smallest distance.
  double reach(int wanted) {
    sorted_ = distances_;
    std::nth_element(sorted_.begin(), sorted_.begin() + wanted - 1, sorted_.end());
    return sorted_[wanted - 1];
  }

  const Plan& plan_;
  std::vector<Row> rows_;
  Job job_;
  Output output_ = {};
  Scratch<float> operands_, scores_, wide_;
  Scratch<char> panels_;
  std::vector<float> scores32_;
  std::vector<int64_t> found_;
  std::vector<double> distances_, sorted_;
  int64_t crowded_ = 0;
};

// Whether products of bfloat16 leave few enough candidates, by some of the rows.
bool pairs_suffice(const Level& level, const Book& book, Search search, const Points& points, int64_t rows) {
  constexpr int64_t kSamples = 4;
  if (rows < 32 * kSamples * kMostRows) return true;
  const Plan plan(level, book, search);
  Searcher searcher(plan);
  Points sample = points;
  sample.row_stride *= rows / (kSamples * kMostRows);
  searcher.run(sample, 0, kSamples * kMostRows, {});
  // Such a row costs about as much as four others.
  return searcher.crowded() * 8 < kSamples * kMostRows;
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
  // In few dimensions centroids lie too close for 16 bits.
  const bool paired = pairs != nullptr && dim > 4 && pairs_suffice(*pairs, book, search, points, rows);
  const Plan plan(paired ? *pairs : plain, book, search);
  const int64_t grain = std::clamp<int64_t>((1 << 20) / (clusters * dim + 1), kMostRows, 4096);
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
    search_float(points, c_data + b * c_bytes, centroids.scalar_type(), rows, clusters, dim, search, output);
  };
  // Many small problems run side by side, each on one thread; large ones one after the other, each on all threads.
  if (batch > 1 && rows * clusters * dim < (int64_t{1} << 22)) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
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

std::tuple<Tensor, Tensor> nearest_centroid(Tensor x, Tensor centroids, std::string precision) {
  return find(x, centroids, {is_exact(precision), 1});
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

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& centroids, bool exact) {
  return find(x, centroids, {exact, 1});
}

}  // namespace centroids
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("nearest_centroid", TORCH_BOX(&clusterq::centroids::nearest_centroid));
  m.impl("two_nearest_centroids", TORCH_BOX(&clusterq::centroids::two_nearest_centroids));
  m.impl("undecided_rows", TORCH_BOX(&clusterq::centroids::undecided_rows));
}
