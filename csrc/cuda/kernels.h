// The CUDA kernels as the op functions in *_ops.cpp see them. Pointers are untyped, `Element` tells what they point to;
// parameters, ranges and their gradients are of the arithmetic type. Every tensor is dense and walked in memory order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "indexing.h"
#include "numerics.h"

namespace clusterq {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };
enum class ActivationKind { kNone, kRelu, kRelu6 };

struct CodeRange {
  int64_t quant_min = 0, quant_max = 0;
  bool symmetric = false;
};

// Scale and zero point of every channel: given, or made of a range and written to `to_scale` and `to_zero_point`.
struct GridSource {
  CodeRange codes;
  const void *scale = nullptr, *zero_point = nullptr;
  const void *low = nullptr, *high = nullptr;
  void *to_scale = nullptr, *to_zero_point = nullptr;
};

// y or, for backward, grad_x; `reverse`: blocks from the last one on.
void launch_fake_quantize(Element element, const void* x, void* y, const Extent& extent, const GridSource& source,
                          ActivationKind activation, bool reverse, cudaStream_t stream);
void launch_fake_quantize_from_range(Element element, const void* x, void* y, const Extent& extent,
                                     const GridSource& source, ActivationKind activation, cudaStream_t stream);
void launch_fake_quantize_backward(Element element, const void* grad, const void* x, void* grad_x, const Extent& extent,
                                   const GridSource& source, ActivationKind activation, cudaStream_t stream);

// Sums of the learned gradients: partial is [2, splits, sums] of double.
struct LearnedPlan {
  bool by_column;
  int width, threads;
  int64_t splits, sums;
};
LearnedPlan plan_learned(Element element, const Extent& extent, bool aligned);
void launch_learned_backward(Element element, const LearnedPlan& plan, const void* grad, const void* x, void* grad_x,
                             double* partial, void* grad_scale, void* grad_zero, const Extent& extent,
                             const GridSource& source, ActivationKind activation, cudaStream_t stream);

// Codes of 1, 2 or 4 bytes; those of one byte are signed or not.
void launch_quantize(Element element, const void* x, void* codes, int code_bytes, const Extent& extent,
                     const GridSource& source, cudaStream_t stream);
void launch_dequantize(Element element, const void* codes, int code_bytes, bool signed_bytes, void* y,
                       const Extent& extent, const GridSource& source, cudaStream_t stream);

// mask: one bit per element in memory order, the first in the lowest bit of the first byte.
void launch_masked(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                   const GridSource& source, ActivationKind activation, Rule rule, bool reverse, cudaStream_t stream);
void launch_masked_from_range(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                              const GridSource& source, ActivationKind activation, Rule rule, cudaStream_t stream);
void launch_masked_backward(int element_bytes, const void* grad, const uint8_t* mask, void* grad_x, int64_t numel,
                            cudaStream_t stream);

// What becomes of the range of x. kStore: it goes to `low` and `high`. kParameters: scale and zero point of it are
// written. kMove: `low` and `high` are moved toward it, then scale and zero point of them are written. kDelayed: the
// same in the other order.
enum class RangeUse { kStore, kParameters, kMove, kDelayed };
struct RangeTarget {
  RangeUse use = RangeUse::kStore;
  CodeRange codes;
  double momentum = 0;
  void *low = nullptr, *high = nullptr, *scale = nullptr, *zero_point = nullptr;
};
// Words of 32 bits, all of them 0, that a launch needs: a counter of blocks and the range of every channel. The launch
// leaves them 0. `reserved` is an offset into memory of the library, negative if it cannot give any: then `words`.
struct RangeScratch {
  int64_t reserved = -1;
  uint32_t* words = nullptr;
};
int64_t range_words(Element element, int64_t channels);
int64_t reserve_range_words(int device, cudaStream_t stream, int64_t words);
void launch_range(Element element, const void* x, const Extent& extent, ActivationKind activation,
                  const RangeTarget& target, const RangeScratch& scratch, cudaStream_t stream);
void launch_delayed(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                    ActivationKind activation, Rule rule, const RangeTarget& target, const RangeScratch& scratch,
                    cudaStream_t stream);

struct Weight {
  const void* w;
  void* y;
  int64_t outer, channels, inner;
  // Place of its scales among those of all weights.
  int64_t first_channel;
};
void launch_weights(Element element, const Weight* weights, int64_t count, const CodeRange& codes, void* scale,
                    void* zero_point, cudaStream_t stream);

// scales, zero_points and result are [candidates, channels], partial [splits, candidates, channels] of double.
int64_t error_splits(const Extent& extent, int64_t candidates);
void launch_error(Element element, const void* x, const Extent& extent, const void* scales, const void* zero_points,
                  int64_t candidates, const CodeRange& codes, double* partial, double* result, cudaStream_t stream);

// Rows of `length` codes and of ceil(length * bits / 8) bytes.
void launch_pack(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t length, int bits, cudaStream_t stream);
void launch_unpack(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t length, int bits, bool is_signed,
                   cudaStream_t stream);

}  // namespace clusterq
