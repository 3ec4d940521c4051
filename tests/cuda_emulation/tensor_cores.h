// Warp-wide matrix instructions for the CPU: every lane lends the others its registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

// Pointers of all lanes; valid until `warp_barrier`, after which they may be gone.
template <typename T>
void lend(T* own, T* (&all)[32]) {
  std::memcpy(emulation::lane_slot(threadIdx.x % 32), &own, sizeof(own));
  emulation::warp_barrier();
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], emulation::lane_slot(lane), sizeof(own));
}

inline void emulated_load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  const uint16_t* rows[32];
  const int lane = threadIdx.x % 32;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  lend(row, rows);
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], rows[i * 8 + lane / 4] + lane % 4 * 2, 4);
  emulation::warp_barrier();
}

// One step of a tensor core on the pessimistic side of what hardware was seen to do: products are exact, and of those
// and the accumulator the bits below 2^-23 of the largest are dropped, eight products at a time.
inline float emulated_accumulate(float sum, const float* a, const float* b) {
  for (int half = 0; half < 2; ++half, a += 8, b += 8) {
    double terms[9] = {sum}, largest = std::fabs(static_cast<double>(sum));
    for (int i = 0; i < 8; ++i) {
      terms[1 + i] = static_cast<double>(a[i]) * b[i];
      largest = std::max(largest, std::fabs(terms[1 + i]));
    }
    double total = 0;
    if (largest == 0 || !std::isfinite(largest)) {
      for (const double term : terms) total += term;
      sum = static_cast<float>(total);
      continue;
    }
    const double unit = std::ldexp(1.0, std::max(std::ilogb(largest), -126) - 23);
    for (const double term : terms) total += std::trunc(term / unit) * unit;
    // Toward 0, to float32.
    float rounded = static_cast<float>(total);
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(total)) rounded = std::nextafter(rounded, 0.0f);
    sum = rounded;
  }
  return sum;
}

// Fragments of m16n8k16: lane l has rows l / 4 and l / 4 + 8 of a and of the result, and column l / 4 of b.
template <typename Widen>
void emulated_multiply_add_tile(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Widen& widen) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const Registers own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Registers* all[32];
  const int lane = threadIdx.x % 32;
  lend(&own, all);
  float rows[2][16], columns[2][16];
  const auto pair = [&](uint32_t word, float* values) {
    values[0] = widen(static_cast<uint16_t>(word));
    values[1] = widen(static_cast<uint16_t>(word >> 16));
  };
  for (int k = 0; k < 4; ++k) {
    const Registers& from = *all[lane / 4 * 4 + k];
    for (int i = 0; i < 4; ++i) pair(from.a[i], rows[i % 2] + i / 2 * 8 + 2 * k);
    for (int c = 0; c < 2; ++c)
      for (int i = 0; i < 2; ++i) pair(all[(lane % 4 * 2 + c) * 4 + k]->b[i], columns[c] + i * 8 + 2 * k);
  }
  for (int i = 0; i < 4; ++i) to[i] = emulated_accumulate(to[i], rows[i / 2], columns[i % 2]);
  emulation::warp_barrier();
}
