// The race of tests/gpu_canary.cu on emulated threads, by name for ctypes; not part of the library of the ops.
#include "../gpu_canary.cu"

#include <vector>

#include "emulated_launch.h"

// Launches, out of `launches`, whose result is wrong; every launch has values of its own, for shared memory keeps those
// of the launch before.
extern "C" int wrong_launches(bool barrier, int launches) {
  int wrong = 0;
  for (int launch = 0; launch < launches; ++launch) {
    std::vector<float> x(kThreads), y(kThreads, -1.0f);
    for (unsigned t = 0; t < kThreads; ++t) x[t] = static_cast<float>(launch * kThreads + t);
    const auto kernel = barrier ? &race<true> : &race<false>;
    emulation::run_grid(1, kThreads, [&] { kernel(x.data(), y.data()); });
    bool right = true;
    for (unsigned t = 0; t < kThreads; ++t) right &= y[t] == x[(t + 37) % kThreads];
    wrong += !right;
  }
  return wrong;
}
