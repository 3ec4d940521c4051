// The most multiply-adds that the processor can do: what a search over N x K centroids of D dimensions is held against.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));

static float run(int64_t steps) {
  // independent sums enough for two units of four cycles each
  Floats sum[12], a = Floats{} + 0.999f, b = Floats{} + 1e-3f;
  for (int i = 0; i < 12; i++) sum[i] = Floats{} + 1e-3f * static_cast<float>(i);
  for (int64_t n = 0; n < steps; n++) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) sum[i] = sum[i] * a + b;
  }
  for (int i = 1; i < 12; i++) sum[0] += sum[i];
  return sum[0][0];
}

// `count` float32 multiply-adds on `threads` threads.
extern "C" float multiply_adds(int64_t count, int threads) {
  const int64_t steps = count / (12 * kLanes) / threads;
  std::vector<float> results(threads);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back([&, t] { results[t] = run(steps); });
  results[0] = run(steps);
  for (auto& thread : others) thread.join();
  float total = 0;
  for (const float value : results) total += value;
  return total;
}
