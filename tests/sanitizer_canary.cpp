// Ops that are wrong on purpose, compiled into the library of `make sanitize` alone and with the flags of its kernels:
// a lane in which one of them goes unnoticed has checked nothing. tests/sanitize.py calls them.
#include "cpu/simd.h"

namespace clusterq {
namespace {

// Compiled for every level as the kernels are; `volatile`, so that the read is not optimised away with its error.
CLUSTERQ_INLINE void read(const float* x, float* out, int64_t index) {
  out[0] = *static_cast<const volatile float*>(x + index);
}

CLUSTERQ_INLINE void to_integer(const float* x, int32_t* out) { out[0] = static_cast<int32_t>(x[0]); }

// x[index], of a float32 tensor; an index past the end reads memory of the allocator.
Tensor element(Tensor x, int64_t index) {
  Tensor out = torch::stable::new_empty(x, {1});
  at_level<read>(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), index);
  return out;
}

// The first element as int32; an infinity is in no integer's range.
Tensor integer(Tensor x) {
  Tensor out = torch::stable::new_empty(x, {1}, ScalarType::Int);
  at_level<to_integer>(static_cast<const float*>(x.const_data_ptr()), static_cast<int32_t*>(out.mutable_data_ptr()));
  return out;
}

// An output like x of which nothing is written.
Tensor unwritten(Tensor x) { return torch::stable::empty_like(x); }

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY(clusterq_canary, m) {
  m.def("element(Tensor x, int index) -> Tensor");
  m.def("integer(Tensor x) -> Tensor");
  m.def("unwritten(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(clusterq_canary, CPU, m) {
  m.impl("element", TORCH_BOX(&clusterq::element));
  m.impl("integer", TORCH_BOX(&clusterq::integer));
  m.impl("unwritten", TORCH_BOX(&clusterq::unwritten));
}
