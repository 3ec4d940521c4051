// What every kernel file needs to validate what memory safety depends on. Semantic checks live in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace clusterq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& tensor, ScalarType wanted, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " has another dtype than its schema asks for");
}

inline void check_numel(const Tensor& tensor, int64_t wanted, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == wanted, name, " has ", tensor.numel(), " elements, wanted ", wanted);
}

}  // namespace clusterq
