// The alignment loss of CUDA tensors: checks, outputs, launches.
#include <tuple>

#include "alignment.h"
#include "host.h"

namespace clusterq {
namespace {

using Optional = std::optional<Tensor>;

// Contiguous tensors that a launch reads, kept alive and checked.
class Arguments {
 public:
  explicit Arguments(const Tensor& x) : x_(x) {}

  const void* read(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes, const char* name) {
    check_dtype(tensor, dtype, name);
    check_sizes(tensor, sizes, name);
    check_device(tensor, x_, name);
    kept_.push_back(packed(tensor));
    return kept_.back().const_data_ptr();
  }
  const void* read(const Optional& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes, const char* name) {
    return tensor ? read(*tensor, dtype, sizes, name) : nullptr;
  }
  // Rows may lie apart.
  const void* rows(const Tensor& tensor, int64_t& stride, const char* name) {
    check_dtype(tensor, x_.scalar_type(), name);
    check_same_sizes(tensor, x_, name);
    check_device(tensor, x_, name);
    const bool dense_rows = tensor.size(1) <= 1 || tensor.stride(1) == 1;
    kept_.push_back(dense_rows ? tensor : torch::stable::contiguous(tensor));
    stride = kept_.back().stride(0);
    return kept_.back().const_data_ptr();
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> kept_;
};

Tensor sized(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> wanted(sizes);
  return torch::stable::new_empty(x, wanted, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alignment_loss(
    const Tensor& mean, const Tensor& var, const Tensor& target_mean, const Tensor& target_spread,
    const Tensor& columns, const Tensor& starts, double weight, bool squared, std::optional<double> floor,
    Optional labels, Optional mask, int64_t slots, int64_t first, Optional class_mean, Optional class_spread,
    Optional known, std::vector<double> class_weights, bool class_average, Optional merged_count, Optional merged_mean,
    Optional merged_var) {
  const ScalarType dtype = mean.scalar_type();
  CLUSTERQ_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "mean must be float32 or float64");
  CLUSTERQ_CHECK(mean.dim() == 2, "mean has ", mean.dim(), " dimensions, wanted 2");
  const int64_t images = mean.size(0), width = mean.size(1), terms = static_cast<int64_t>(class_weights.size());
  CLUSTERQ_CHECK(slots >= 0, "slots is ", slots, ", wanted 0 or more");
  CLUSTERQ_CHECK(first >= 0 && first <= width, "first is ", first, ", wanted 0 to ", width);
  CLUSTERQ_CHECK(terms <= kMostTerms, "class_weights has ", terms, " weights, wanted ", kMostTerms, " or fewer");
  CLUSTERQ_CHECK(starts.dim() == 1, "starts has ", starts.dim(), " dimensions, wanted 1");
  const Launch launch(mean);
  Arguments arguments(mean);
  Alignment p;
  p.wide = dtype == ScalarType::Double;
  p.images = images;
  p.columns = width;
  p.first = first;
  p.slots = slots;
  p.mean = arguments.rows(mean, p.mean_stride, "mean");
  p.var = arguments.rows(var, p.var_stride, "var");
  p.target_mean = arguments.read(target_mean, dtype, {width}, "target_mean");
  p.target_spread = arguments.read(target_spread, dtype, {width}, "target_spread");
  p.weights = arguments.read(columns, dtype, {3, width}, "columns");
  if (!squared) {
    p.starts = static_cast<const int64_t*>(arguments.read(starts, ScalarType::Long, {starts.size(0)}, "starts"));
    p.layers = starts.size(0) - 1;
  }
  p.weight = weight;
  p.squared = squared;
  p.rooted = floor.has_value();
  p.floor = floor.value_or(0);
  p.average = class_average;
  p.labels = static_cast<const int64_t*>(arguments.read(labels, ScalarType::Long, {images}, "labels"));
  p.mask = static_cast<const bool*>(arguments.read(mask, ScalarType::Bool, {images}, "mask"));
  p.known = static_cast<const bool*>(arguments.read(known, ScalarType::Bool, {slots}, "known"));
  const std::initializer_list<int64_t> targets{terms, slots, width - first};
  p.class_mean = arguments.read(class_mean, dtype, targets, "class_mean");
  p.class_spread = arguments.read(class_spread, dtype, targets, "class_spread");
  // The terms of classes need all of these.
  if (labels && class_mean && class_spread) {
    p.terms = static_cast<int>(terms);
    for (int64_t i = 0; i < terms; ++i) p.class_weights[i] = class_weights[i];
  }
  CLUSTERQ_CHECK(p.terms == terms, "class_weights has ", terms, " weights, wanted none without classes and targets");

  const int64_t rows = 1 + slots;
  p.given = merged_count && merged_mean && merged_var;
  CLUSTERQ_CHECK(labels || slots == 0 || p.given, "slots is ", slots, " without labels, wanted 0");
  Tensor counts, means, variances;
  const auto room = [&](Tensor& tensor, std::initializer_list<int64_t> sizes) {
    tensor = sized(mean, sizes, ScalarType::Double);
    return static_cast<double*>(tensor.mutable_data_ptr());
  };
  if (p.given) {
    const auto read = [&](const Optional& tensor, std::initializer_list<int64_t> sizes, const char* name) {
      return static_cast<const double*>(arguments.read(tensor, ScalarType::Double, sizes, name));
    };
    p.merged_count = const_cast<double*>(read(merged_count, {rows}, "merged_count"));
    p.merged_mean = const_cast<double*>(read(merged_mean, {rows, width}, "merged_mean"));
    p.merged_var = const_cast<double*>(read(merged_var, {rows, width}, "merged_var"));
  } else if (!squared) {
    p.merged_count = room(counts, {rows});
    p.merged_mean = room(means, {rows, width});
    p.merged_var = room(variances, {rows, width});
  }
  Tensor partial;
  p.partial = room(partial, {alignment_blocks(width), 1 + terms});
  const Tensor total = sized(mean, {}, dtype), found = sized(mean, {1 + terms}, dtype);
  const Tensor grad_mean = sized(mean, {images, width}, dtype), grad_var = sized(mean, {images, width}, dtype);
  const Tensor count = sized(mean, {slots}, ScalarType::Long);
  const Tensor own_mean = sized(mean, {slots, width - first}, dtype);
  const Tensor own_spread = sized(mean, {slots, width - first}, dtype);
  p.total = total.mutable_data_ptr();
  p.to_terms = found.mutable_data_ptr();
  p.grad_mean = grad_mean.mutable_data_ptr();
  p.grad_var = grad_var.mutable_data_ptr();
  p.count = static_cast<int64_t*>(count.mutable_data_ptr());
  p.own_mean = own_mean.mutable_data_ptr();
  p.own_spread = own_spread.mutable_data_ptr();
  p.reserved = reserve_alignment_counter(mean.get_device_index(), launch.stream());
  launch_alignment(p, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {total, found, grad_mean, grad_var, count, own_mean, own_spread};
}

}  // namespace

std::vector<std::string> alignment_ops() { return {"alignment_loss"}; }

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) { m.impl("alignment_loss", TORCH_BOX(&clusterq::alignment_loss)); }
