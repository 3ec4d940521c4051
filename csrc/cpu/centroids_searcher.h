// The search over one set of centroids: how its panels are laid out, and the rows of one thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "centroids_book.h"

namespace clusterq {
namespace centroids {
namespace {

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
      Points part = points;
      part.data = points.row(n);
      scan(part, count);
    }
  }

  // Rows with more candidates than are kept.
  int64_t crowded() const { return crowded_; }

 private:
  void scan(const Points& points, int64_t count) {
    const Book& book = plan_.book;
    float* wide = points.direct() ? nullptr : wide_.reserve(kMostRows * plan_.dim);
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
      plan_.level.scan(job_, {here, plan_.dim, operands, book.offset(first)}, points, count, first,
                       first + here == clusters, operands_.get(), scores_.get(), wide, rows_.data(), output_);
    }
  }

  void decide(const float* x, const Row& row, int64_t number) {
    int64_t index[2] = {-1, -1};
    const int wanted = plan_.search.count;
    bool alone = false;
    const bool usable = row.count != kMeasure || std::none_of(x, x + plan_.dim, [](float v) { return std::isnan(v); });
    if (usable) alone = choose(x, row, index);
    for (int n = 0; n < wanted; n++) {
      const int64_t k = index[n];
      output_.set(number * wanted + n, k, k < 0 ? 0 : plan_.book.measure(x, k));
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

}  // namespace
}  // namespace centroids
}  // namespace clusterq
