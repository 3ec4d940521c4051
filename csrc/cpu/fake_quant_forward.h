// The forward of one piece of memory, at the level of the CPU.
#pragma once

#include "fake_quant_avx512.h"
#include "fake_quant_bfloat16.h"
#include "fake_quant_table_avx512.h"

namespace clusterq {
namespace {

template <typename T, typename A, typename G>
CLUSTERQ_INLINE void forward_run(const T* x, T* y, int64_t n, G grids, Activation<A> activation) {
  if constexpr (std::is_same_v<G, OneGrid<A>>) {
    const Steps<A> steps = to_steps(grids.grid, activation);
    for (int64_t i = 0; i < n; ++i) y[i] = store<T>(fake_quantize(load<A>(x[i]), steps));
  } else {
    for (int64_t i = 0; i < n; ++i)
      y[i] = store<T>(fake_quantize(clamp(load<A>(x[i]), activation.low, activation.high), grids.at(i)));
  }
}

template <typename T, typename A, typename G>
void forward_piece(const T* x, T* y, int64_t n, const G& grids, const Activation<A>& activation) {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<G, OneGrid<A>>) {
    // Of a short run, such as a channel of a small weight, the table would be most of the work.
    if (n >= 8 * kTableCodes && cpu_level() == CpuLevel::kAvx512) {
      const Steps<A> steps = to_steps(grids.grid, activation);
      const TableEnds ends(steps);
      if (ends.usable) return forward_table(x, y, n, steps, ends);
    }
  }
  if constexpr (std::is_same_v<T, BFloat16>)
    if (rounds_exactly(grids.least_scale())) return forward_bfloat16(x, y, n, grids, activation);
  if constexpr (std::is_same_v<A, float>)
    if (cpu_level() == CpuLevel::kAvx512) return forward_lanes(x, y, n, grids, activation);
#endif
  at_level<forward_run<T, A, G>>(x, y, n, grids, activation);
}

}  // namespace
}  // namespace clusterq
