// The alignment loss on CUDA: a block has 32 columns of the statistics [N, D], merges them over the images of the batch
// and of every class, compares and writes their gradients; the last block adds up the loss. Norms of layers need all
// columns first: there the merged statistics pass through memory to a second launch. Everything is float64 and summed
// in a fixed order.
#include <algorithm>

#include "alignment.h"
#include "device.h"
#include "word_pool.h"

namespace clusterq {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// Scratch of the library, zero from the start and after every launch: see WordPool.
constexpr int64_t kCounters = int64_t(1) << 16;
__device__ alignas(128) uint32_t counters[kCounters];
// Images that a warp loads before it uses the first.
constexpr int kAhead = 4;

template <typename A>
struct Typed {
  const A *mean, *var, *target_mean, *target_spread, *weights, *class_mean, *class_spread;
  A *total, *terms, *grad_mean, *grad_var, *own_mean, *own_spread;
};

struct Form {
  double value, slope;
};

// What is compared of a variance, and its derivative.
__device__ __forceinline__ Form spread_of(const Alignment& p, double var) {
  if (!p.rooted) return {var, 1};
  const double root = sqrt(var + p.floor);
  return {root, 0.5 / root};
}

// Calls `use(n, value)` with value = `load(n)` for the images that are chosen, in order: all of them, or those that
// fall to this warp when the warps take kAhead images in turn. For whole warps.
template <bool kShared, typename Choose, typename Load, typename Use>
__device__ __forceinline__ void for_images(const Alignment& p, const Choose& choose, const Load& load, const Use& use) {
  constexpr int kWidth = kShared ? kAhead : 32;
  const int lane = threadIdx.x % 32;
  for (int64_t base = kShared ? threadIdx.x / 32 * kWidth : 0; base < p.images;
       base += kWidth * (kShared ? kWarps : 1)) {
    unsigned bits = __ballot_sync(kFullWarp, lane < kWidth && base + lane < p.images && choose(base + lane));
    while (bits != 0) {
      int at[kAhead];
      decltype(load(base)) values[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        at[j] = __ffs(bits) - 1;
        bits &= bits - 1;
        if (at[j] >= 0) values[j] = load(base + at[j]);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at[j] >= 0) use(base + at[j], values[j]);
    }
  }
}

// Sum over the warps, for every thread. Two rooms in turn: the second call does not overtake the first.
__device__ __forceinline__ double over_warps(double (*room)[32], double value) {
  const int lane = threadIdx.x % 32;
  room[threadIdx.x / 32][lane] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += room[w][lane];
  return sum;
}

// Sums the blocks' parts of the loss, a warp for each term; for one whole block.
template <typename A>
__device__ __forceinline__ void finish(const Alignment& p, const Typed<A>& t, int64_t blocks) {
  __shared__ double found[1 + kMostTerms];
  const int lane = threadIdx.x % 32, term = threadIdx.x / 32;
  // Written by other blocks of this launch.
  const volatile double* const partial = p.partial;
  if (term <= p.terms) {
    double sum = 0;
    for (int64_t b = lane; b < blocks; b += 32) sum += partial[b * (1 + p.terms) + term];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bits);
    if (lane == 0) {
      t.terms[term] = static_cast<A>(sum);
      found[term] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double all = p.weight * found[0];
#pragma unroll
  for (int i = 0; i < kMostTerms; ++i)
    if (i < p.terms) all += p.class_weights[i] * found[1 + i];
  *t.total = static_cast<A>(all);
}

struct Norms {
  double offset, excess;
};

// kMerge: the statistics are merged here, else read. kLoss: they are compared here, else written.
template <bool kMerge, bool kLoss, typename A>
__global__ void __launch_bounds__(kThreads, 1)
    alignment_kernel(const __grid_constant__ Alignment p, const __grid_constant__ Typed<A> t) {
  __shared__ double room[2][kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane, columns = p.columns;
  const bool inside = column < columns, in_classes = inside && column >= p.first;
  const auto mean_at = [&](int64_t n) { return static_cast<double>(t.mean[n * p.mean_stride + column]); };
  const auto var_at = [&](int64_t n) { return static_cast<double>(t.var[n * p.var_stride + column]); };
  const auto in_class = [&](int64_t n, int64_t k) { return p.labels[n] == k && (p.mask == nullptr || p.mask[n]); };
  const auto is_known = [&](int64_t k) { return p.known == nullptr || p.known[k]; };
  struct Pair {
    double mean, var;
  };

  // The batch: images are spread over the warps.
  double center = 0, variance = 0, images = static_cast<double>(p.images);
  if constexpr (kMerge) {
    const auto all = [](int64_t) { return true; };
    const double divisor = p.images > 0 ? images : 1;
    double sum = 0, squares = 0;
    for_images<true>(p, all, [&](int64_t n) { return inside ? mean_at(n) : 0; }, [&](int64_t, double m) { sum += m; });
    center = over_warps(room[0], sum) / divisor;
    for_images<true>(
        p, all, [&](int64_t n) { return inside ? Pair{mean_at(n), var_at(n)} : Pair{0, 0}; },
        [&](int64_t, const Pair& m) { squares += m.var + (m.mean - center) * (m.mean - center); });
    variance = over_warps(room[1], squares) / divisor;
    if (!kLoss && warp == 0) {
      if (inside) {
        p.merged_mean[column] = center;
        p.merged_var[column] = variance;
      }
      if (column == 0) p.merged_count[0] = images;
    }
  } else {
    images = p.merged_count[0];
    if (inside) {
      center = p.merged_mean[column];
      variance = p.merged_var[column];
    }
  }

  // Coefficients of the batch term's gradient, and the parts of the loss that this thread sums.
  double batch_mean = 0, batch_var = 0, terms[1 + kMostTerms] = {};
  if constexpr (kLoss) {
    const auto difference = [&](int64_t c, double m, double v, double& slope) {
      const Form form = spread_of(p, v * static_cast<double>(t.weights[columns + c]));
      slope = form.slope * static_cast<double>(t.weights[columns + c]);
      return Norms{m - static_cast<double>(t.target_mean[c]), form.value - static_cast<double>(t.target_spread[c])};
    };
    double slope = 0;
    Norms apart{0, 0};
    if (inside) apart = difference(column, center, variance, slope);
    if (p.squared) {
      const double w = inside ? static_cast<double>(t.weights[column]) : 0;
      if (warp == 0 && inside) terms[0] = w * (apart.offset * apart.offset + apart.excess * apart.excess);
      batch_mean = 2 * w * apart.offset;
      batch_var = 2 * w * apart.excess * slope;
    } else if constexpr (!kMerge) {
      const int64_t tile = static_cast<int64_t>(blockIdx.x) * 32;
      for (int64_t l = 0; l < p.layers; ++l) {
        const int64_t begin = p.starts[l], end = p.starts[l + 1];
        if (begin >= tile + 32 || end <= tile || begin >= end) continue;
        Norms norms{0, 0};
        for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
          double unused;
          const Norms d = difference(c, p.merged_mean[c], p.merged_var[c], unused);
          norms.offset += d.offset * d.offset;
          norms.excess += d.excess * d.excess;
        }
        for (int bits = 16; bits > 0; bits /= 2) {
          norms.offset += __shfl_xor_sync(kFullWarp, norms.offset, bits);
          norms.excess += __shfl_xor_sync(kFullWarp, norms.excess, bits);
        }
        __syncthreads();
        norms.offset = sqrt(over_warps(room[0], norms.offset));
        norms.excess = sqrt(over_warps(room[1], norms.excess));
        const double w = static_cast<double>(t.weights[begin]);
        if (column >= begin && column < end) {
          batch_mean = norms.offset > 0 ? w * apart.offset / norms.offset : 0;
          batch_var = norms.excess > 0 ? w * apart.excess / norms.excess * slope : 0;
        }
        if (warp == 0 && column == begin) terms[0] += w * (norms.offset + norms.excess);
      }
    }
    batch_mean *= p.weight / images;
    batch_var *= p.weight / images;
  }
  const auto write = [&](int64_t n, double m, double by_mean, double by_var) {
    if (!inside) return;
    t.grad_mean[n * columns + column] = static_cast<A>(batch_mean + 2 * batch_var * (m - center) + by_mean);
    t.grad_var[n * columns + column] = static_cast<A>(batch_var + by_var);
  };

  // The classes: every warp has its own.
  const int64_t class_columns = columns - p.first;
  double share = 1;
  if constexpr (kLoss) {
    if (p.terms > 0 && p.average) {
      double present = 0;
      for (int64_t k = warp; k < p.slots; k += kWarps) {
        bool any = false;
        if constexpr (kMerge) {
          for (int64_t base = 0; base < p.images && !any; base += 32)
            any = __ballot_sync(kFullWarp, base + lane < p.images && in_class(base + lane, k)) != 0;
        } else {
          any = p.merged_count[1 + k] > 0;
        }
        present += any && is_known(k);
      }
      __syncthreads();
      present = over_warps(room[0], present);
      share = 1 / (present > 1 ? present : 1);
    }
  }
  for (int64_t k = warp; k < p.slots; k += kWarps) {
    const auto chosen = [&](int64_t n) { return in_class(n, k); };
    const int64_t at = (1 + k) * columns + column;
    double size = 0, own_mean = 0, own_var = 0;
    if constexpr (kMerge) {
      double sum = 0, squares = 0;
      for_images<false>(
          p, chosen, [&](int64_t n) { return in_classes ? mean_at(n) : 0; },
          [&](int64_t, double m) {
            sum += m;
            size += 1;
          });
      own_mean = sum / (size > 0 ? size : 1);
      for_images<false>(
          p, chosen, [&](int64_t n) { return in_classes ? Pair{mean_at(n), var_at(n)} : Pair{0, 0}; },
          [&](int64_t, const Pair& m) { squares += m.var + (m.mean - own_mean) * (m.mean - own_mean); });
      own_var = squares / (size > 0 ? size : 1);
    } else {
      size = p.merged_count[1 + k];
      if (in_classes) {
        own_mean = p.merged_mean[at];
        own_var = p.merged_var[at];
      }
    }
    if constexpr (!kLoss) {
      if (in_classes) {
        p.merged_mean[at] = own_mean;
        p.merged_var[at] = own_var;
      }
      if (blockIdx.x == 0 && lane == 0) p.merged_count[1 + k] = size;
    } else {
      if (blockIdx.x == 0 && lane == 0) p.count[k] = static_cast<int64_t>(size);
      const Form form = spread_of(p, own_var);
      double by_mean = 0, by_var = 0;
      if (in_classes) {
        const int64_t place = k * class_columns + column - p.first;
        t.own_mean[place] = static_cast<A>(own_mean);
        t.own_spread[place] = static_cast<A>(form.value);
        if (size > 0 && is_known(k)) {
          const double w = share * static_cast<double>(t.weights[2 * columns + column]);
#pragma unroll
          for (int i = 0; i < kMostTerms; ++i) {
            if (i >= p.terms) break;
            const double offset = own_mean - static_cast<double>(t.class_mean[i * p.slots * class_columns + place]);
            const double excess = form.value - static_cast<double>(t.class_spread[i * p.slots * class_columns + place]);
            terms[1 + i] += w * (offset * offset + excess * excess);
            by_mean += 2 * p.class_weights[i] * w * offset;
            by_var += 2 * p.class_weights[i] * w * excess * form.slope;
          }
          by_mean /= size;
          by_var /= size;
        }
      }
      if (p.labels != nullptr) {
        for_images<false>(
            p, chosen, [&](int64_t n) { return inside ? mean_at(n) : 0; },
            [&](int64_t n, double m) { write(n, m, by_mean + 2 * by_var * (m - own_mean), by_var); });
      }
    }
  }
  if constexpr (kLoss) {
    for_images<true>(
        p,
        [&](int64_t n) {
          const bool in_any = p.labels != nullptr && p.labels[n] >= 0 && p.labels[n] < p.slots;
          return !(in_any && in_class(n, p.labels[n]));
        },
        [&](int64_t n) { return inside ? mean_at(n) : 0; }, [&](int64_t n, double m) { write(n, m, 0, 0); });
#pragma unroll
    for (int i = 0; i < 1 + kMostTerms; ++i) {
      if (i > p.terms) break;
      double sum = terms[i];
      for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bits);
      __syncthreads();
      sum = over_warps(room[0], sum);
      if (threadIdx.x == 0) p.partial[static_cast<int64_t>(blockIdx.x) * (1 + p.terms) + i] = sum;
    }
    if (p.reserved < 0) return;
    // The last block to come here sums the parts of all.
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
      __threadfence();
      is_last = atomicAdd(counters + p.reserved, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    finish(p, t, gridDim.x);
    if (threadIdx.x == 0) counters[p.reserved] = 0;
  }
}

// By a block of its own, where there is no counter.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    alignment_finish_kernel(const __grid_constant__ Alignment p, const __grid_constant__ Typed<A> t, int64_t blocks) {
  finish(p, t, blocks);
}

template <typename A>
void run(const Alignment& p, cudaStream_t stream) {
  const Typed<A> t{
      static_cast<const A*>(p.mean),          static_cast<const A*>(p.var),     static_cast<const A*>(p.target_mean),
      static_cast<const A*>(p.target_spread), static_cast<const A*>(p.weights), static_cast<const A*>(p.class_mean),
      static_cast<const A*>(p.class_spread),  static_cast<A*>(p.total),         static_cast<A*>(p.to_terms),
      static_cast<A*>(p.grad_mean),           static_cast<A*>(p.grad_var),      static_cast<A*>(p.own_mean),
      static_cast<A*>(p.own_spread)};
  const int64_t blocks = alignment_blocks(p.columns);
  if (!p.given && p.squared) {
    launch(alignment_kernel<true, true, A>, blocks, kThreads, stream, p, t);
  } else {
    if (!p.given) launch(alignment_kernel<true, false, A>, blocks, kThreads, stream, p, t);
    launch(alignment_kernel<false, true, A>, blocks, kThreads, stream, p, t);
  }
  if (p.reserved < 0) launch(alignment_finish_kernel<A>, 1, kThreads, stream, p, t, blocks);
}

}  // namespace

// One at least, for what is counted.
int64_t alignment_blocks(int64_t columns) { return std::max<int64_t>(blocks_of(columns, 32), 1); }

int64_t reserve_alignment_counter(int device, cudaStream_t stream) {
  static WordPool reserved(kCounters);
  return reserved.reserve(device, stream, 1);
}

void launch_alignment(const Alignment& alignment, cudaStream_t stream) {
  alignment.wide ? run<double>(alignment, stream) : run<float>(alignment, stream);
}

}  // namespace clusterq
