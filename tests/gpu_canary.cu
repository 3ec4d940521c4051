// One kernel for each check of compute-sanitizer that is wrong in its way: `bench/gpu_check.sh` wants each of them
// reported before it trusts the check. `test_cuda_emulation.py` runs the race on its emulated threads.
#include <cuda_runtime.h>

#include <cstring>

namespace {

constexpr unsigned kThreads = 256;

__global__ void write_past_the_end(float* x) { x[1 << 22] = 1.0f; }

// Thread t reads what its neighbour wrote; `Barrier` is what a right kernel has in between.
template <bool Barrier>
__global__ void race(const float* x, float* y) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = x[threadIdx.x];
  if constexpr (Barrier) __syncthreads();
  y[threadIdx.x] = shared[(threadIdx.x + 37) % kThreads];
}

__global__ void read_what_nobody_wrote(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1.0f; }

}  // namespace

#if !defined(CLUSTERQ_EMULATED)
int main(int count, char** names) {
  if (count != 2) return 64;
  float *x = nullptr, *y = nullptr;
  if (cudaMalloc(&x, kThreads * sizeof(float)) != cudaSuccess) return 1;
  if (cudaMalloc(&y, kThreads * sizeof(float)) != cudaSuccess) return 1;
  if (std::strcmp(names[1], "memcheck") == 0) {
    write_past_the_end<<<1, 1>>>(x);
  } else if (std::strcmp(names[1], "racecheck") == 0) {
    cudaMemset(x, 0, kThreads * sizeof(float));
    race<false><<<1, kThreads>>>(x, y);
  } else if (std::strcmp(names[1], "initcheck") == 0) {
    read_what_nobody_wrote<<<1, kThreads>>>(x, y);
  } else {
    return 64;
  }
  cudaDeviceSynchronize();
  cudaFree(x);
  cudaFree(y);
  return 0;
}
#endif
