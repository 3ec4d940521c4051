// One set of centroids: its centre, norms and panels, and the float64 measurements that settle a row.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "centroids_search.h"

namespace clusterq {
namespace centroids {

// sum (x - c_k)^2 in float64, in the order of d, of four centroids of [clusters, dim].
inline void measure4(const float* x, const float* centroids, int64_t dim, const int64_t* k, double* distance) {
  const float* c[4];
  for (int j = 0; j < 4; j++) c[j] = centroids + k[j] * dim;
  double sum[4] = {};
  for (int64_t d = 0; d < dim; d++) {
    for (int j = 0; j < 4; j++) {
      const double difference = static_cast<double>(x[d]) - static_cast<double>(c[j][d]);
      sum[j] += difference * difference;
    }
  }
  std::copy_n(sum, 4, distance);
}

// The `wanted` nearest, 1 or 2, of the listed centroids, of all without a list; -1 where there is none.
inline void nearest_by_distance(const float* x, const float* centroids, int64_t clusters, int64_t dim,
                                const std::vector<int64_t>* list, int wanted, int64_t* index) {
  const int64_t count = list == nullptr ? clusters : static_cast<int64_t>(list->size());
  double lowest[2] = {0, 0};
  index[0] = index[wanted - 1] = -1;
  const auto before = [&](double distance, int64_t k, int n) {
    return index[n] < 0 || distance < lowest[n] || (distance == lowest[n] && k < index[n]);
  };
  for (int64_t first = 0; first < count; first += 4) {
    int64_t ids[4];
    double distance[4];
    for (int64_t j = 0; j < 4; j++) {
      const int64_t i = std::min(first + j, count - 1);
      ids[j] = list == nullptr ? i : (*list)[i];
    }
    measure4(x, centroids, dim, ids, distance);
    for (int64_t j = 0; j < std::min<int64_t>(4, count - first); j++) {
      if (std::isnan(distance[j])) continue;
      if (before(distance[j], ids[j], 0)) {
        if (wanted == 2) lowest[1] = lowest[0], index[1] = index[0];
        lowest[0] = distance[j], index[0] = ids[j];
      } else if (wanted == 2 && before(distance[j], ids[j], 1)) {
        lowest[1] = distance[j], index[1] = ids[j];
      }
    }
  }
}

class Book {
 public:
  // `values` [clusters, dim] must outlive the object. `level` may have pairs, then `plain` is the one without.
  // `copies`: centroids equal to one of lower index take part.
  Book(const Level& plain, const Level& level, const float* values, int64_t clusters, int64_t dim, bool copies)
      : plain_(plain), level_(level), values_(values), clusters_(clusters), dim_(dim), loses_(clusters, 0) {
    offset_.assign(clusters + kMostWidth, -std::numeric_limits<float>::infinity());
    norm_.assign(clusters, 0.0f);
    lost_.assign(clusters, 0.0f);
    parallel([&](int64_t k) { find_unusable(k); });
    if (!copies) find_copies();
    find_centre();
    parallel([&](int64_t k) { find_norm(k); });
    set_apart();
    for (int64_t k = 0; k < clusters; k++) {
      if (offset_[k] == -std::numeric_limits<float>::infinity()) continue;
      largest_norm_ = std::max(largest_norm_, static_cast<double>(norm_[k]));
      largest_half_ = std::max(largest_half_, 0.5 * static_cast<double>(norm_[k]) * norm_[k]);
      largest_lost_ = std::max(largest_lost_, static_cast<double>(lost_[k]));
      any_ = true;
    }
  }

  Bound bound(bool pairs, bool exact) const {
    Bound bound = Bound::of(dim_, pairs, exact);
    bound.half = largest_half_;
    if (pairs) bound.lost = std::max(largest_lost_, std::numeric_limits<double>::min());
    // No score to go by, or too many terms for the slack in the bound: measure every row in float64.
    const bool scored = any_ && !unbounded_ && dim_ <= kLargestDim;
    bound.norm = scored ? largest_norm_ : std::numeric_limits<double>::infinity();
    return bound;
  }

  const float* values() const { return values_; }
  const float* origin() const { return centre_.data(); }
  // [clusters]: not in the panels
  const char* left_out() const { return loses_.data(); }
  const std::vector<int64_t>& apart() const { return apart_; }
  const float* offset(int64_t first) const { return offset_.data() + first; }
  int64_t clusters() const { return clusters_; }

  // Bytes of the panels of `count` centroids.
  static int64_t bytes(const Level& level, int64_t count, int64_t dim) {
    const int64_t padded = (count + level.lanes - 1) / level.lanes * level.lanes;
    return padded * (level.pairs ? (dim + 1) / 2 : dim) * 4;
  }

  // Packs one panel, that of centroids [first, first + two registers).
  void pack(const Level& level, int64_t first, char* target) const {
    const int64_t count = std::min<int64_t>(2 * level.lanes, clusters_ - first);
    const int64_t width = count > level.lanes ? 2 * level.lanes : level.lanes;
    level.pack(values_ + first * dim_, loses_.data() + first, centre_.data(), count, width, dim_, target);
  }

  // Centroids whose score in float32 may be among the `wanted` best of a row, appended to `found`.
  void rank(const float* x, double row_norm, int wanted, std::vector<float>& scores,
            std::vector<int64_t>& found) const {
    scores.resize(clusters_);
    plain_.score_row(x, values_, centre_.data(), offset_.data(), clusters_, dim_, scores.data());
    const Bound plain = bound(false, true);
    const auto error = [&](int64_t k) {
      const double apart = row_norm + norm_[k];
      return plain.sums * (row_norm * norm_[k] - offset_[k]) + (dim_ + 3) * 0x1p-53 * apart * apart +
             plain.underflow(row_norm);
    };
    double reach[2] = {-std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
    const auto usable = [&](int64_t k) { return offset_[k] > -std::numeric_limits<float>::infinity(); };
    for (int64_t k = 0; k < clusters_; k++) {
      if (!usable(k)) continue;
      const double low = scores[k] - error(k);
      if (low > reach[0]) {
        reach[1] = reach[0], reach[0] = low;
      } else {
        reach[1] = std::max(reach[1], low);
      }
    }
    for (int64_t k = 0; k < clusters_; k++) {
      if (usable(k) && scores[k] + error(k) >= reach[wanted - 1]) found.push_back(k);
    }
  }

  // Whether centroid k, set apart, may lie as near as `distance` to a row of this norm.
  bool within(int64_t k, double row_norm, double distance) const {
    const double gap = static_cast<double>(norm_[k]) * (1 - 1e-5) - row_norm;
    return !(gap > 0 && gap * gap > distance * (1 + 1e-5));
  }

  double measure(const float* x, int64_t k) const { return plain_.measure(x, values_ + k * dim_, dim_); }

  // `nearest_by_distance` among these centroids.
  void settle(const float* x, const std::vector<int64_t>* list, int wanted, int64_t* index) const {
    nearest_by_distance(x, values_, clusters_, dim_, list, wanted, index);
  }

 private:
  template <class F>
  void parallel(const F& body) {
    const int64_t grain = std::max<int64_t>(16, 65536 / dim_);
    torch::stable::parallel_for(0, clusters_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) body(k);
    });
  }

  // No finite row can choose a centroid that is not finite.
  void find_unusable(int64_t k) {
    uint32_t special = 0;
    for (int64_t d = 0; d < dim_; d++) special |= (as_bits(values_[k * dim_ + d]) & 0x7f800000u) == 0x7f800000u;
    loses_[k] = special != 0;
  }

  // Nor one with the same bits as one of lower index: left in, copies would tie with the winner and send all its rows
  // to float64.
  void find_copies() {
    std::vector<uint32_t> keys(clusters_);
    std::vector<int32_t> order(clusters_);
    parallel([&](int64_t k) {
      uint32_t key = 0;
      for (int64_t d = 0; d < dim_; d++) {
        key += as_bits(values_[k * dim_ + d]) * (0x9e3779b1u * static_cast<uint32_t>(2 * d + 1));
      }
      keys[k] = key;
    });
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int32_t a, int32_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
    // Equal keys stand together in rising order of index; each is compared with the first of its run.
    int64_t first = 0;
    for (int64_t i = 1; i < clusters_; i++) {
      const int64_t a = order[first], b = order[i];
      if (keys[a] != keys[b]) {
        first = i;
      } else if (std::memcmp(values_ + a * dim_, values_ + b * dim_, sizeof(float) * dim_) == 0) {
        loses_[b] = 1;
      }
    }
  }

  // Coordinate-wise median of evenly spread centroids: scores relative to it keep their digits whatever the offset of
  // the data, and unlike the mean it does not follow a few centroids that lie far out.
  void find_centre() {
    constexpr int64_t kSample = 31;
    centre_.assign(dim_ + kMostWidth, 0.0f);
    std::vector<int64_t> used;
    for (int64_t k = 0; k < clusters_; k++) {
      if (!loses_[k]) used.push_back(k);
    }
    const int64_t all = static_cast<int64_t>(used.size()), count = std::min(all, kSample);
    if (count == 0) return;
    float sample[kSample];
    for (int64_t d = 0; d < dim_; d++) {
      for (int64_t i = 0; i < count; i++) sample[i] = values_[used[i * all / count] * dim_ + d];
      std::nth_element(sample, sample + count / 2, sample + count);
      centre_[d] = sample[count / 2];
    }
  }

  void find_norm(int64_t k) {
    if (loses_[k]) return;
    const Size64 size = level_.size(values_ + k * dim_, centre_.data(), dim_);
    offset_[k] = static_cast<float>(-0.5 * size.squares);
    norm_[k] = static_cast<float>(std::sqrt(size.squares) * (1 + 1e-6));
    lost_[k] = static_cast<float>(std::sqrt(size.lost) * (1 + 1e-6));
  }

  // A few centroids far out would widen the bound for all, and such with scores that overflow float32 would have none:
  // they stay out of the panels and are measured where they may matter.
  void set_apart() {
    constexpr int64_t kMost = 4, kMostHuge = 16;
    const auto huge = [&](int64_t k) {
      return !loses_[k] && !(0.5 * static_cast<double>(norm_[k]) * norm_[k] < kLargest);
    };
    for (int64_t k = 0; k < clusters_; k++) {
      if (huge(k)) apart_.push_back(k);
    }
    if (static_cast<int64_t>(apart_.size()) > kMostHuge) {
      unbounded_ = true;
      return;
    }
    if (apart_.empty() && clusters_ > 2 * kMost) {
      std::vector<int64_t> order(clusters_);
      std::iota(order.begin(), order.end(), int64_t{0});
      std::partial_sort(order.begin(), order.begin() + kMost + 1, order.end(),
                        [&](int64_t a, int64_t b) { return norm_[a] != norm_[b] ? norm_[a] > norm_[b] : a < b; });
      for (int64_t i = 0; i < kMost && norm_[order[i]] > 4 * norm_[order[kMost]]; i++) apart_.push_back(order[i]);
      std::sort(apart_.begin(), apart_.end());
    }
    for (const int64_t k : apart_) {
      loses_[k] = 1;
      offset_[k] = -std::numeric_limits<float>::infinity();
    }
  }

  const Level &plain_, &level_;
  const float* values_;
  int64_t clusters_, dim_;
  std::vector<char> loses_;
  std::vector<float> offset_, norm_, lost_, centre_;
  std::vector<int64_t> apart_;
  double largest_norm_ = 0, largest_half_ = 0, largest_lost_ = 0;
  bool any_ = false, unbounded_ = false;
};

}  // namespace centroids
}  // namespace clusterq
