// An op that computes nothing, with the arguments of fake_quantize: bench/ measures against it what a call costs.
#include <optional>
#include <string>

#include "layout.h"

namespace clusterq {
namespace {

Tensor empty(const Tensor& x, const Tensor&, const Tensor&, int64_t, int64_t, std::optional<int64_t>, std::string) {
  return x;
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY(clusterq_bench, m) {
  m.def(
      "empty(Tensor(a) x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, str activation)"
      " -> Tensor(a)");
}

STABLE_TORCH_LIBRARY_IMPL(clusterq_bench, CPU, m) { m.impl("empty", TORCH_BOX(&clusterq::empty)); }
