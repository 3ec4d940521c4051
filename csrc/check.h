// What every kernel file needs to validate what memory safety depends on. Semantic checks live in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

// torch 2.11 and 2.12 have it under another name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

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

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text.empty() ? "[]" : text + "]";
}

inline bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> wanted) {
  if (tensor.dim() != static_cast<int64_t>(wanted.size())) return false;
  int64_t d = 0;
  for (const int64_t size : wanted) {
    if (tensor.size(d++) != size) return false;
  }
  return true;
}

inline void check_sizes(const Tensor& tensor, std::initializer_list<int64_t> wanted, const char* name) {
  STD_TORCH_CHECK(has_sizes(tensor, wanted), name, " has shape ", shape_text(tensor.sizes()), ", wanted ",
                  shape_text(wanted));
}

inline void check_same_sizes(const Tensor& tensor, const Tensor& other, const char* name) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < other.dim(); ++d) same = tensor.size(d) == other.size(d);
  STD_TORCH_CHECK(same, name, " has shape ", shape_text(tensor.sizes()), ", wanted ", shape_text(other.sizes()));
}

// Expanded tensors cannot be written: several of their elements are one.
inline void check_writable(const Tensor& tensor, const char* name) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.stride(d) != 0, name,
                    " is expanded, its elements share memory; wanted one that can be written");
  }
}

}  // namespace clusterq
