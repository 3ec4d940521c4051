// What every kernel file needs to validate what memory safety depends on. Semantic checks live in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

// torch 2.11 and 2.12 have it under another name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace clusterq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void append(std::string& text, const std::string& part) { text += part; }
// C++17: what torch 2.11 compiles extensions as.
template <typename Number, std::enable_if_t<std::is_integral_v<Number>, int> = 0>
void append(std::string& text, Number number) {
  text += std::to_string(number);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

// In place of STD_TORCH_CHECK, which writes numbers to an ostream: on one H200 image code of libstdc++ was linked into
// this library, and writing a number there ended the process. torch's own headers still do.
#define CLUSTERQ_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::clusterq::fail(__VA_ARGS__); \
  } while (false)

inline void check_contiguous(const Tensor& tensor, const char* name) {
  CLUSTERQ_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& tensor, ScalarType wanted, const char* name) {
  CLUSTERQ_CHECK(tensor.scalar_type() == wanted, name, " has another dtype than its schema asks for");
}

inline void check_numel(const Tensor& tensor, int64_t wanted, const char* name) {
  CLUSTERQ_CHECK(tensor.numel() == wanted, name, " has ", tensor.numel(), " elements, wanted ", wanted);
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
  CLUSTERQ_CHECK(has_sizes(tensor, wanted), name, " has shape ", shape_text(tensor.sizes()), ", wanted ",
                 shape_text(wanted));
}

inline void check_same_sizes(const Tensor& tensor, const Tensor& other, const char* name) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < other.dim(); ++d) same = tensor.size(d) == other.size(d);
  CLUSTERQ_CHECK(same, name, " has shape ", shape_text(tensor.sizes()), ", wanted ", shape_text(other.sizes()));
}

// Expanded tensors cannot be written: several of their elements are one.
inline void check_writable(const Tensor& tensor, const char* name) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    CLUSTERQ_CHECK(tensor.size(d) <= 1 || tensor.stride(d) != 0, name,
                   " is expanded, its elements share memory; wanted one that can be written");
  }
}

}  // namespace clusterq
