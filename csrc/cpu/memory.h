// Memory of large outputs. glibc maps blocks from 32 MiB on afresh for every tensor, and the kernel hands their pages
// out one fault at a time: at 4 KiB a page that takes three times as long as fake-quantizing them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "check.h"

namespace clusterq {

// Asks for transparent huge pages (2 MiB) under a tensor that was just allocated, where the system leaves that choice
// to programs (`madvise`, the setting of most distributions). Only a request: what comes of it changes no result.
inline void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21, kLeast = uintptr_t(1) << 25;
  static const bool wanted = [] {
    const char* variable = std::getenv("CLUSTERQ_HUGE_PAGES");
    return variable == nullptr || std::strcmp(variable, "0") != 0;
  }();
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  if (!wanted || bytes < kLeast) return;
  // Whole pages inside the tensor: its neighbours keep what they have.
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An output with the dtype, sizes and strides of x, which is dense.
inline Tensor output_like(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  prefer_huge_pages(out);
  return out;
}

}  // namespace clusterq
