// Stands in for the device parts of csrc/cuda/host.h: the ops are registered for tensors of the CPU.
#pragma once

#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK()
#define CLUSTERQ_KEY CPU

namespace clusterq {
namespace {

class Launch {
 public:
  explicit Launch(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_device(const Tensor&, const Tensor&, const char*) {}

}  // namespace
}  // namespace clusterq
