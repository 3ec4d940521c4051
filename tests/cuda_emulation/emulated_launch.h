#pragma once

#include <functional>

namespace emulation {

// Runs `body` once per thread of every block.
void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body);

}  // namespace emulation
