// Words of device memory that are 0 between launches, shared by the launches of a stream: counters and ranges, which
// every launch leaves 0 again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "indexing.h"

namespace clusterq {

class WordPool {
 public:
  explicit WordPool(int64_t size) : size_(size) {}

  // Launches of one stream follow each other, so they share words, by the id of the stream, which no later stream gets
  // again. A launch that is captured into a graph may run in another stream, beside launches of this one: it gets words
  // of its own, for good. -1 where the pool is used up.
  int64_t reserve(int device, cudaStream_t stream, int64_t words) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
    unsigned long long id = 0;
    const bool known = cudaStreamIsCapturing(stream, &status) == cudaSuccess;
    const bool captured = status != cudaStreamCaptureStatusNone;
    if (!known || (!captured && cudaStreamGetId(stream, &id) != cudaSuccess)) {
      // Not an error of the launch to come.
      static_cast<void>(cudaGetLastError());
      return -1;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    Region& region = regions_[{device, id}];
    if (!captured && region.size >= words) return region.offset;
    // A line of the cache to each.
    const int64_t size = blocks_of(words, 32) * 32;
    int64_t& next = used_[device];
    if (size > size_ - next) return -1;
    const int64_t offset = next;
    next += size;
    if (!captured) region = {offset, size};
    return offset;
  }

 private:
  struct Region {
    int64_t offset = 0, size = 0;
  };
  const int64_t size_;
  std::mutex mutex_;
  std::map<int, int64_t> used_;
  std::map<std::pair<int, unsigned long long>, Region> regions_;
};

}  // namespace clusterq
