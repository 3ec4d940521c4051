// CPU kernel of the alignment loss; arguments and formulas: clusterq/ops/_alignment_op.py. Columns are worked on in
// fixed blocks, sums run over images and blocks in order: results do not depend on the number of threads.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/simd.h"

namespace clusterq::alignment {
namespace {

// Columns of a block: its sums in double and one row of it per image stay in the L1 cache.
constexpr int64_t kBlock = 64;

template <class E>
struct Matrix {
  const E* data = nullptr;
  int64_t step = 0;

  const E* row(int64_t n) const { return data + n * step; }
};

// [N, D], copied where rows are not D neighbours.
template <class E>
Matrix<E> matrix(Tensor& tensor) {
  if (tensor.size(1) != 1 && tensor.stride(1) != 1) tensor = packed(tensor);
  return {static_cast<const E*>(tensor.const_data_ptr()), tensor.stride(0)};
}

template <class E>
const E* data_of(std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  *tensor = packed(*tensor);
  return static_cast<const E*>(tensor->const_data_ptr());
}

// The form of a variance that is compared, and its derivative.
struct Spread {
  std::optional<double> floor;

  double value(double var) const { return floor.has_value() ? std::sqrt(var + *floor) : var; }
  double slope(double spread) const { return floor.has_value() ? 0.5 / spread : 1.0; }
};

// center[i] = mean of `width` columns over the rows listed (all of them where `rows` is null), then the biased
// variance.
template <class E>
CLUSTERQ_INLINE void moments_body(const E* mean, const E* var, int64_t mean_step, int64_t var_step, const int64_t* rows,
                                  int64_t count, int64_t width, double* center, double* spread) {
  for (int64_t i = 0; i < width; ++i) center[i] = spread[i] = 0;
  for (int64_t r = 0; r < count; ++r) {
    const E* m = mean + (rows == nullptr ? r : rows[r]) * mean_step;
    for (int64_t i = 0; i < width; ++i) center[i] += m[i];
  }
  const double images = count > 0 ? static_cast<double>(count) : 1;
  for (int64_t i = 0; i < width; ++i) center[i] /= images;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = rows == nullptr ? r : rows[r];
    const E *m = mean + n * mean_step, *v = var + n * var_step;
    for (int64_t i = 0; i < width; ++i) {
      const double offset = m[i] - center[i];
      spread[i] += v[i] + offset * offset;
    }
  }
  for (int64_t i = 0; i < width; ++i) spread[i] /= images;
}

// Gradients of `width` columns of one image: (by_mean + 2 by_var (mean - center)) / images and by_var / images, stored
// or, where `add` is set, added.
template <class E>
CLUSTERQ_INLINE void gradient_body(const E* mean, int64_t width, const double* center, const double* by_mean,
                                   const double* by_var, double inverse, bool add, double* grad_mean,
                                   double* grad_var) {
  for (int64_t i = 0; i < width; ++i) {
    const double own_mean = (by_mean[i] + 2 * by_var[i] * (mean[i] - center[i])) * inverse;
    const double own_var = by_var[i] * inverse;
    grad_mean[i] = add ? grad_mean[i] + own_mean : own_mean;
    grad_var[i] = add ? grad_var[i] + own_var : own_var;
  }
}

template <class E>
class Loss {
 public:
  // Of the op's arguments.
  Matrix<E> mean, var;
  int64_t images = 0, width = 0, slots = 0, first = 0;
  const E *target_mean = nullptr, *target_spread = nullptr, *columns = nullptr;
  std::vector<int64_t> starts;
  double weight = 0;
  bool squared = true, average = false;
  Spread form;
  const E *class_mean = nullptr, *class_spread = nullptr;
  const bool* known = nullptr;
  std::vector<double> class_weights;
  const double *merged_count = nullptr, *merged_mean = nullptr, *merged_var = nullptr;
  // Images of every class, in order.
  std::vector<std::vector<int64_t>> members;
  // Outputs.
  E *total = nullptr, *terms = nullptr, *grad_mean = nullptr, *grad_var = nullptr, *own_mean = nullptr,
    *own_spread = nullptr;
  int64_t* class_count = nullptr;

  void run() {
    const int64_t blocks = ceil_div(width, kBlock), classes = static_cast<int64_t>(class_weights.size());
    center_.resize(width);
    spread_.resize(width);
    by_mean_.resize(width);
    by_var_.resize(width);
    find_present();
    const int64_t grain = images * width < 32768 ? std::max<int64_t>(1, blocks) : 1;
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) batch_moments(b * kBlock, std::min(kBlock, width - b * kBlock));
    });
    const double batch = batch_term();
    std::vector<double> partial(blocks * classes, 0.0);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(2 * images * kBlock);
      for (int64_t b = begin; b < end; ++b) {
        gradients(b * kBlock, std::min(kBlock, width - b * kBlock), sums.data(), partial.data() + b * classes);
      }
    });
    double sum = weight * batch;
    terms[0] = static_cast<E>(batch);
    for (int64_t t = 0; t < classes; ++t) {
      double term = 0;
      for (int64_t b = 0; b < blocks; ++b) term += partial[b * classes + t];
      terms[1 + t] = static_cast<E>(term);
      sum += class_weights[t] * term;
    }
    *total = static_cast<E>(sum);
  }

 private:
  double size_of(int64_t row) const {
    if (merged_count != nullptr) return merged_count[row];
    return static_cast<double>(row == 0 ? images : static_cast<int64_t>(members[row - 1].size()));
  }

  void find_present() {
    int64_t found = 0;
    present_.assign(slots, false);
    for (int64_t k = 0; k < slots; ++k) {
      class_count[k] = static_cast<int64_t>(size_of(1 + k));
      present_[k] = class_count[k] > 0 && (known == nullptr || known[k]);
      found += present_[k];
    }
    share_ = average && found > 1 ? 1.0 / static_cast<double>(found) : 1.0;
  }

  // Mean and biased variance of the batch (row 0) or of class row - 1 in columns from c on.
  void moments(int64_t row, int64_t c, int64_t count, double* center, double* spread) const {
    if (merged_mean != nullptr) {
      std::copy_n(merged_mean + row * width + c, count, center);
      std::copy_n(merged_var + row * width + c, count, spread);
      return;
    }
    const int64_t* rows = row == 0 ? nullptr : members[row - 1].data();
    const int64_t chosen = row == 0 ? images : static_cast<int64_t>(members[row - 1].size());
    at_level<moments_body<E>>(mean.data + c, var.data + c, mean.step, var.step, rows, chosen, count, center, spread);
  }

  void batch_moments(int64_t c, int64_t count) { moments(0, c, count, center_.data() + c, spread_.data() + c); }

  // The batch term; leaves in by_mean_ and by_var_ the derivatives of the total by the batch's mean and variance.
  double batch_term() {
    double result = 0;
    std::vector<double> offset(width), excess(width);
    for (int64_t c = 0; c < width; ++c) {
      const double factor = columns[width + c], spread = form.value(spread_[c] * factor);
      offset[c] = center_[c] - target_mean[c];
      excess[c] = spread - target_spread[c];
      by_var_[c] = weight * form.slope(spread) * factor;
    }
    if (squared) {
      for (int64_t c = 0; c < width; ++c) {
        const double w = columns[c];
        result += w * (offset[c] * offset[c] + excess[c] * excess[c]);
        by_mean_[c] = weight * (2 * w * offset[c]);
        by_var_[c] *= 2 * w * excess[c];
      }
      return result;
    }
    for (size_t l = 0; l + 1 < starts.size(); ++l) {
      double first_norm = 0, second_norm = 0;
      for (int64_t c = starts[l]; c < starts[l + 1]; ++c) {
        first_norm += offset[c] * offset[c];
        second_norm += excess[c] * excess[c];
      }
      if (starts[l] == starts[l + 1]) continue;
      first_norm = std::sqrt(first_norm);
      second_norm = std::sqrt(second_norm);
      const double w = columns[starts[l]];
      result += w * (first_norm + second_norm);
      for (int64_t c = starts[l]; c < starts[l + 1]; ++c) {
        by_mean_[c] = first_norm > 0 ? weight * w * offset[c] / first_norm : 0;
        by_var_[c] *= second_norm > 0 ? w * excess[c] / second_norm : 0;
      }
    }
    return result;
  }

  // Gradients of all images in columns [c, c + count): of the batch term, then of the class terms, whose values are
  // added to `term`.
  void gradients(int64_t c, int64_t count, double* sums, double* term) {
    double *sum_mean = sums, *sum_var = sums + images * count;
    const double inverse = 1.0 / size_of(0);
    for (int64_t n = 0; n < images; ++n) {
      at_level<gradient_body<E>>(mean.row(n) + c, count, center_.data() + c, by_mean_.data() + c, by_var_.data() + c,
                                 inverse, false, sum_mean + n * count, sum_var + n * count);
    }
    // Only columns from `first` on have class terms.
    const int64_t c0 = std::max(c, first), used = c + count - c0;
    if (used > 0) {
      for (int64_t k = 0; k < slots; ++k) class_gradients(k, c0, used, c0 - c, count, sum_mean, sum_var, term);
    }
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < count; ++i) {
        grad_mean[n * width + c + i] = static_cast<E>(sum_mean[n * count + i]);
        grad_var[n * width + c + i] = static_cast<E>(sum_var[n * count + i]);
      }
    }
  }

  void class_gradients(int64_t k, int64_t c0, int64_t used, int64_t shift, int64_t count, double* sum_mean,
                       double* sum_var, double* term) {
    double center[kBlock], spread[kBlock], by_mean[kBlock], by_var[kBlock];
    moments(1 + k, c0, used, center, spread);
    const int64_t own_width = width - first, at = c0 - first;
    for (int64_t i = 0; i < used; ++i) {
      spread[i] = form.value(spread[i]);
      own_mean[k * own_width + at + i] = static_cast<E>(center[i]);
      own_spread[k * own_width + at + i] = static_cast<E>(spread[i]);
      by_mean[i] = by_var[i] = 0;
    }
    if (!present_[k]) return;
    for (size_t t = 0; t < class_weights.size(); ++t) {
      const int64_t goal = (static_cast<int64_t>(t) * slots + k) * own_width + at;
      for (int64_t i = 0; i < used; ++i) {
        const double w = share_ * columns[2 * width + c0 + i];
        const double offset = center[i] - class_mean[goal + i], excess = spread[i] - class_spread[goal + i];
        term[t] += w * (offset * offset + excess * excess);
        by_mean[i] += 2 * class_weights[t] * w * offset;
        by_var[i] += 2 * class_weights[t] * w * excess * form.slope(spread[i]);
      }
    }
    const double inverse = 1.0 / size_of(1 + k);
    for (const int64_t n : members[k]) {
      at_level<gradient_body<E>>(mean.row(n) + c0, used, static_cast<const double*>(center),
                                 static_cast<const double*>(by_mean), static_cast<const double*>(by_var), inverse, true,
                                 sum_mean + n * count + shift, sum_var + n * count + shift);
    }
  }

  std::vector<double> center_, spread_, by_mean_, by_var_;
  std::vector<bool> present_;
  double share_ = 1;
};

void check_optional(const std::optional<Tensor>& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes,
                    const char* name) {
  if (!tensor.has_value()) return;
  check_dtype(*tensor, dtype, name);
  check_sizes(*tensor, sizes, name);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs alignment_loss(Tensor mean, Tensor var, const Tensor& target_mean, const Tensor& target_spread,
                       const Tensor& columns, const Tensor& starts, double weight, bool squared,
                       std::optional<double> floor, const std::optional<Tensor>& labels,
                       const std::optional<Tensor>& mask, int64_t slots, int64_t first,
                       std::optional<Tensor> class_mean, std::optional<Tensor> class_spread,
                       std::optional<Tensor> known, std::vector<double> class_weights, bool class_average,
                       std::optional<Tensor> merged_count, std::optional<Tensor> merged_mean,
                       std::optional<Tensor> merged_var) {
  CLUSTERQ_CHECK(mean.dim() == 2, "mean must be [N, D]");
  const ScalarType dtype = mean.scalar_type();
  const int64_t images = mean.size(0), width = mean.size(1), terms = static_cast<int64_t>(class_weights.size());
  CLUSTERQ_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "mean must be float32 or float64");
  CLUSTERQ_CHECK(slots >= 0 && first >= 0 && first <= width, "slots or first is out of range");
  CLUSTERQ_CHECK(labels.has_value() || slots == 0, "slots without labels");
  CLUSTERQ_CHECK(terms == 0 || (class_mean.has_value() && class_spread.has_value()), "class targets are missing");
  CLUSTERQ_CHECK(
      merged_count.has_value() == merged_mean.has_value() && merged_count.has_value() == merged_var.has_value(),
      "merged_count, merged_mean and merged_var come together");
  check_dtype(var, dtype, "var");
  check_same_sizes(var, mean, "var");
  check_optional(target_mean, dtype, {width}, "target_mean");
  check_optional(target_spread, dtype, {width}, "target_spread");
  check_optional(columns, dtype, {3, width}, "columns");
  check_optional(labels, ScalarType::Long, {images}, "labels");
  check_optional(mask, ScalarType::Bool, {images}, "mask");
  check_optional(known, ScalarType::Bool, {slots}, "known");
  check_optional(class_mean, dtype, {terms, slots, width - first}, "class_mean");
  check_optional(class_spread, dtype, {terms, slots, width - first}, "class_spread");
  check_optional(merged_count, ScalarType::Double, {1 + slots}, "merged_count");
  check_optional(merged_mean, ScalarType::Double, {1 + slots, width}, "merged_mean");
  check_optional(merged_var, ScalarType::Double, {1 + slots, width}, "merged_var");
  check_dtype(starts, ScalarType::Long, "starts");
  CLUSTERQ_CHECK(starts.dim() == 1, "starts must be [L + 1]");

  const Tensor total = torch::stable::new_empty(mean, {}, dtype),
               each = torch::stable::new_empty(mean, {1 + terms}, dtype);
  const Tensor grad_mean = torch::stable::new_empty(mean, {images, width}, dtype);
  const Tensor grad_var = torch::stable::new_empty(mean, {images, width}, dtype);
  const Tensor count = torch::stable::new_empty(mean, {slots}, ScalarType::Long);
  const Tensor own_mean = torch::stable::new_empty(mean, {slots, width - first}, dtype);
  const Tensor own_spread = torch::stable::new_empty(mean, {slots, width - first}, dtype);

  std::vector<std::vector<int64_t>> members(slots);
  if (labels.has_value()) {
    const Tensor index = packed(*labels);
    std::optional<Tensor> kept = mask;
    const auto* label = static_cast<const int64_t*>(index.const_data_ptr());
    const bool* keep = data_of<bool>(kept);
    for (int64_t n = 0; n < images; ++n) {
      if (label[n] >= 0 && label[n] < slots && (keep == nullptr || keep[n])) members[label[n]].push_back(n);
    }
  }
  const Tensor goal_mean = packed(target_mean), goal_spread = packed(target_spread), shape = packed(columns),
               ends = packed(starts);
  const auto fill = [&](auto element) {
    using E = decltype(element);
    Loss<E> loss;
    loss.mean = matrix<E>(mean);
    loss.var = matrix<E>(var);
    loss.images = images;
    loss.width = width;
    loss.slots = slots;
    loss.first = first;
    loss.target_mean = static_cast<const E*>(goal_mean.const_data_ptr());
    loss.target_spread = static_cast<const E*>(goal_spread.const_data_ptr());
    loss.columns = static_cast<const E*>(shape.const_data_ptr());
    const auto* bounds = static_cast<const int64_t*>(ends.const_data_ptr());
    loss.starts.assign(bounds, bounds + ends.numel());
    for (const int64_t bound : loss.starts) CLUSTERQ_CHECK(bound >= 0 && bound <= width, "starts is out of range");
    loss.weight = weight;
    loss.squared = squared;
    loss.average = class_average;
    loss.form.floor = floor;
    loss.class_mean = data_of<E>(class_mean);
    loss.class_spread = data_of<E>(class_spread);
    loss.known = data_of<bool>(known);
    loss.class_weights = class_weights;
    loss.merged_count = data_of<double>(merged_count);
    loss.merged_mean = data_of<double>(merged_mean);
    loss.merged_var = data_of<double>(merged_var);
    loss.members = std::move(members);
    loss.total = static_cast<E*>(total.mutable_data_ptr());
    loss.terms = static_cast<E*>(each.mutable_data_ptr());
    loss.grad_mean = static_cast<E*>(grad_mean.mutable_data_ptr());
    loss.grad_var = static_cast<E*>(grad_var.mutable_data_ptr());
    loss.class_count = static_cast<int64_t*>(count.mutable_data_ptr());
    loss.own_mean = static_cast<E*>(own_mean.mutable_data_ptr());
    loss.own_spread = static_cast<E*>(own_spread.mutable_data_ptr());
    loss.run();
  };
  if (dtype == ScalarType::Double) {
    fill(double{});
  } else {
    fill(float{});
  }
  return {total, each, grad_mean, grad_var, count, own_mean, own_spread};
}

}  // namespace
}  // namespace clusterq::alignment

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("alignment_loss", TORCH_BOX(&clusterq::alignment::alignment_loss));
}
