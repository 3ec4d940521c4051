// Centroids packed for the search, the bound on the error of their scores, and the float64 measurement that settles
// what the bound leaves open.
//
// With u = 2^-24, x' = fl(x - m), c' = fl(c - m) and m a median of the centroids, the computed score s_k differs from
// t_k = x.c - |c|^2/2 (taken relative to m, exactly) by at most E_k = (D + 8) u / (1 - (D + 8) u) (|x'||c'_k| +
// |c'_k|^2/2): D + 1 roundings of the sum, with or without FMA, 3 of x', c' and |c'|^2/2, and the rest for second-order
// terms.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "centroids_common.h"

namespace clusterq {
namespace centroids {

// A packed set of centroids as the inner loops read it.
struct Book {
  int64_t clusters, dim;
  // [panels][dim][width], the last panel only as wide as needed; padded with 0
  const float* panels;
  // -|c'|^2 / 2; -inf for padding and for centroids that cannot win
  const float* offset;
};

constexpr double kUnit = 0x1p-24;
// Below this no partial sum of a score can overflow float32.
constexpr double kLargest = 1e37;
constexpr int64_t kLargestDim = 1 << 18;

// Centroids of one batch entry, packed for the search, and what the error bound needs to know about them.
class Codebook {
 public:
  Codebook(int lanes, int width, int64_t clusters, int64_t dim)
      : lanes_(lanes), width_(width), clusters_(clusters), dim_(dim) {
    const int64_t padded = (clusters + width - 1) / width * width;
    panels_.reserve(padded * dim);
    offset_.reserve(padded);
    norm_.reserve(padded);
    centre_.reserve(dim);
    const double steps = static_cast<double>(dim + 8) * kUnit;
    relative_ = 1.01 * steps / (1 - steps);
  }

  // `values` [clusters, dim] must outlive the object.
  void pack(const float* values) {
    values_ = values;
    find_losers();
    find_centre();
    largest_norm_ = largest_half_ = 0;
    const int64_t padded = (clusters_ + width_ - 1) / width_ * width_;
    std::fill_n(offset_.get(), padded, -std::numeric_limits<float>::infinity());
    std::fill_n(norm_.get(), padded, 0.0f);
    bool any = false;
    for (int64_t first = 0; first < clusters_; first += width_) {
      const int64_t count = std::min(width_, clusters_ - first);
      const int64_t width = (count + lanes_ - 1) / lanes_ * lanes_;
      float* panel = panels_.get() + first * dim_;
      for (int64_t j = 0; j < width; j++) {
        const int64_t k = first + j;
        const bool used = j < count && !loses_[k];
        double squares = 0;
        for (int64_t d = 0; d < dim_; d++) {
          const float value = used ? values[k * dim_ + d] - centre_.get()[d] : 0.0f;
          panel[d * width + j] = value;
          squares += static_cast<double>(value) * value;
        }
        if (!used) continue;
        any = true;
        offset_.get()[k] = static_cast<float>(-0.5 * squares);
        norm_.get()[k] = static_cast<float>(std::sqrt(squares) * (1 + 1e-6));
        largest_norm_ = std::max(largest_norm_, std::sqrt(squares) * (1 + 1e-6));
        largest_half_ = std::max(largest_half_, 0.5 * squares);
      }
    }
    // No score to go by, or too many terms for the slack in the bound: measure every row in float64.
    if (!any || dim_ > kLargestDim) largest_norm_ = std::numeric_limits<double>::infinity();
  }

  Book book() const { return {clusters_, dim_, panels_.get(), offset_.get()}; }
  const float* centre() const { return centre_.get(); }
  const float* row(int64_t k) const { return values_ + k * dim_; }

  // Bound on every |x'.c'| + |c'|^2/2 of a row with this norm: finite and below kLargest when the search can be
  // trusted.
  double magnitude(double row_norm) const { return row_norm * largest_norm_ + largest_half_; }

  // Largest error of any score of such a row.
  double error(double row_norm) const { return relative_ * magnitude(row_norm) + underflow(row_norm); }

  // Error of the score of centroid k.
  double error(double row_norm, int64_t k) const {
    return relative_ * (row_norm * norm_.get()[k] - offset_.get()[k]) + underflow(row_norm);
  }

  // argmin_k sum (x - c_k)^2 in float64 over the centroids that `candidate(k)` lets through; -1 when all are NaN.
  template <class F>
  int64_t measure(const float* x, const F& candidate) const {
    int64_t index = -1, waiting[4];
    double lowest = 0, distance[4];
    int count = 0;
    const auto decide = [&] {
      for (int j = count; j < 4; j++) waiting[j] = waiting[0];
      measure4(x, waiting, distance);
      for (int j = 0; j < count; j++) {
        const bool lower = index < 0 ? distance[j] == distance[j] : distance[j] < lowest;
        if (lower) lowest = distance[j], index = waiting[j];
      }
      count = 0;
    };
    for (int64_t k = 0; k < clusters_; k++) {
      if (!candidate(k)) continue;
      waiting[count++] = k;
      if (count == 4) decide();
    }
    if (count > 0) decide();
    return index;
  }

 private:
  // What rounding to zero or to subnormals may add, with or without flush-to-zero.
  double underflow(double row_norm) const {
    return static_cast<double>(dim_) * 0x1p-120 * (1 + row_norm + largest_norm_);
  }

  void measure4(const float* x, const int64_t* k, double* distance) const {
    const float* c[4] = {row(k[0]), row(k[1]), row(k[2]), row(k[3])};
    double sum[4] = {};
    for (int64_t d = 0; d < dim_; d++) {
      for (int j = 0; j < 4; j++) {
        const double difference = static_cast<double>(x[d]) - static_cast<double>(c[j][d]);
        sum[j] += difference * difference;
      }
    }
    std::copy_n(sum, 4, distance);
  }

  // Centroids that no finite row can choose: not finite, or the same bits as one of lower index. Left in, copies would
  // tie with the winner and send all its rows to float64.
  void find_losers() {
    loses_.assign(clusters_, 0);
    keys_.resize(clusters_);
    order_.resize(clusters_);
    for (int64_t k = 0; k < clusters_; k++) {
      uint64_t key = 0xcbf29ce484222325u;
      uint32_t special = 0;
      for (int64_t d = 0; d < dim_; d++) {
        const uint32_t bits = as_bits(row(k)[d]);
        special |= (bits & 0x7f800000u) == 0x7f800000u;
        key = (key ^ bits) * 0x100000001b3u;
        key ^= key >> 29;
      }
      loses_[k] = special != 0;
      keys_[k] = key;
    }
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::sort(order_.begin(), order_.end(),
              [&](int64_t a, int64_t b) { return keys_[a] != keys_[b] ? keys_[a] < keys_[b] : a < b; });
    // Equal keys stand together in rising order of index; each is compared with the first of its run.
    int64_t first = 0;
    for (int64_t i = 1; i < clusters_; i++) {
      const int64_t a = order_[first], b = order_[i];
      if (keys_[a] != keys_[b]) {
        first = i;
      } else if (std::memcmp(row(a), row(b), sizeof(float) * dim_) == 0) {
        loses_[b] = 1;
      }
    }
  }

  // Coordinate-wise median of evenly spread centroids: scores relative to it keep their digits whatever the offset of
  // the data, and unlike the mean it does not follow a few centroids that lie far out.
  void find_centre() {
    constexpr int64_t kSample = 31;
    order_.clear();
    for (int64_t k = 0; k < clusters_; k++) {
      if (!loses_[k]) order_.push_back(k);
    }
    const int64_t used = static_cast<int64_t>(order_.size()), count = std::min(used, kSample);
    float values[kSample];
    for (int64_t d = 0; d < dim_; d++) {
      for (int64_t i = 0; i < count; i++) values[i] = row(order_[i * used / count])[d];
      std::nth_element(values, values + count / 2, values + count);
      centre_.get()[d] = count > 0 ? values[count / 2] : 0.0f;
    }
  }

  int64_t lanes_, width_;
  int64_t clusters_, dim_;
  const float* values_ = nullptr;
  Scratch<float> panels_, offset_, norm_, centre_;
  std::vector<char> loses_;
  std::vector<uint64_t> keys_;
  std::vector<int64_t> order_;
  double relative_, largest_norm_ = 0, largest_half_ = 0;
};

}  // namespace centroids
}  // namespace clusterq
