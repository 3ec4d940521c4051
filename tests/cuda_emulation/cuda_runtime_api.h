// The part of the CUDA runtime that csrc/cuda uses, for the CPU: kernels run one thread after the other, see
// emulation.cpp. Enough to find an index out of place; tells nothing about speed.
#pragma once

#include <cstdint>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

// Set by the tests.
extern "C" int emulated_capture;
extern "C" unsigned long long emulated_stream_id;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated_capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = emulated_stream_id;
  return cudaSuccess;
}
