// Index arithmetic of the CUDA kernels, for host and device compilers.
#pragma once

#include <cstdint>

#include "inline.h"

namespace clusterq {

CLUSTERQ_INLINE int64_t blocks_of(int64_t elements, int64_t per_block) {
  return (elements + per_block - 1) / per_block;
}

// Division by a number that a whole launch shares. `small`: dividends below 2^31, one wide multiplication; otherwise
// below 2^51, through double with a correction, as a 64-bit division is a subroutine that takes registers with it.
struct Divider {
  int64_t divisor = 1;
  double inverse = 1;
  uint32_t multiplier = 0, shift = 31;

  Divider() = default;
  // With s = ceil(log2 d) and m = floor(2^(31 + s) / d) + 1, the error of n * m / 2^(31 + s) is below n / 2^31 / d.
  explicit Divider(int64_t d) : divisor(d), inverse(1.0 / static_cast<double>(d)) {
    if (d >= int64_t(1) << 31) return;
    uint32_t s = 0;
    while ((int64_t(1) << s) < d) ++s;
    shift = 31 + s;
    multiplier = static_cast<uint32_t>((uint64_t(1) << shift) / static_cast<uint64_t>(d) + 1);
  }

  CLUSTERQ_INLINE int64_t quotient(int64_t n, bool small) const {
    if (small) return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> shift);
    const int64_t q = static_cast<int64_t>(static_cast<double>(n) * inverse), rest = n - q * divisor;
    return q + (rest >= divisor) - (rest < 0);
  }
};

// Dense memory as [outer, channels, inner], walked in memory order.
struct Extent {
  int64_t numel = 0, channels = 1, inner = 1;
};

struct Shape {
  int64_t numel;
  Divider inner, channels;
  // Indices past the end stay below 2^31 too.
  bool small;
  // Blocks are taken from the last one on: what a kernel before this one read last is still in the cache.
  bool reverse;

  explicit Shape(const Extent& extent, bool backwards = false)
      : numel(extent.numel),
        inner(extent.inner > 0 ? extent.inner : 1),
        channels(extent.channels > 0 ? extent.channels : 1),
        small(extent.numel <= (int64_t(1) << 30)),
        reverse(backwards) {}

  CLUSTERQ_INLINE int64_t block(int64_t index, int64_t blocks) const { return reverse ? blocks - 1 - index : index; }
};

// Most runs of `inner` elements that `elements` neighbours touch.
CLUSTERQ_INLINE int64_t runs_touched(int64_t elements, int64_t inner) { return (elements + inner - 2) / inner + 1; }

// The channels of a block's elements [start, end), numbered from 0: as runs where there are few, else all of them.
struct Window {
  int64_t first_run;
  int slots;
  bool by_channel;

  CLUSTERQ_INLINE Window(const Shape& shape, int64_t start, int64_t end) {
    first_run = shape.inner.quotient(start, shape.small);
    const int64_t runs = shape.inner.quotient(end - 1, shape.small) - first_run + 1;
    by_channel = runs > shape.channels.divisor;
    slots = static_cast<int>(by_channel ? shape.channels.divisor : runs);
  }

  CLUSTERQ_INLINE int64_t channel(const Shape& shape, int slot) const {
    if (by_channel) return slot;
    const int64_t run = first_run + slot;
    return run - shape.channels.quotient(run, shape.small) * shape.channels.divisor;
  }

  // Slot of an element; `left`: how many elements of its run are left, itself included, as far as an int goes.
  CLUSTERQ_INLINE int slot(const Shape& shape, int64_t element, int& left) const {
    const int64_t run = shape.inner.quotient(element, shape.small);
    const int64_t rest = shape.inner.divisor - (element - run * shape.inner.divisor);
    left = static_cast<int>(rest < (int64_t(1) << 30) ? rest : int64_t(1) << 30);
    if (!by_channel) return static_cast<int>(run - first_run);
    return static_cast<int>(run - shape.channels.quotient(run, shape.small) * shape.channels.divisor);
  }

  // One element on.
  CLUSTERQ_INLINE void advance(const Shape& shape, int& slot, int& left) const {
    if (--left > 0) return;
    left = shape.inner.divisor < (int64_t(1) << 30) ? static_cast<int>(shape.inner.divisor) : 1 << 30;
    if (++slot == slots && by_channel) slot = 0;
  }
};

// Where pack i of a channel starts, V elements to the pack; a run is per_run packs long.
struct ChannelWalk {
  int64_t channels, inner;
  Divider per_run;
  bool small, single;

  ChannelWalk(const Extent& extent, int width)
      : channels(extent.channels), inner(extent.inner), per_run(blocks_of(extent.inner, width)) {
    small = extent.numel <= (int64_t(1) << 30);
    single = extent.numel == extent.channels * extent.inner;
  }

  CLUSTERQ_INLINE int64_t at(int64_t channel, int64_t pack, int width) const {
    const int64_t run = single ? 0 : per_run.quotient(pack, small);
    return (run * channels + channel) * inner + (pack - run * per_run.divisor) * width;
  }
};

// Last entry whose `first` is at most `index`; entries ascend, the first starts at 0.
template <typename Entry>
CLUSTERQ_INLINE int find_entry(const Entry* entries, int count, int64_t index) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (entries[middle].first_block <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Codes in the bytes of a word, first code in the lowest byte, to `bits` bits each, and back.
CLUSTERQ_INLINE uint32_t pack_word(uint32_t word, int bits) {
  if (bits == 4) {
    word &= 0x0f0f0f0fu;
    word |= word >> 4;
    return (word & 0xffu) | (word >> 8 & 0xff00u);
  }
  word &= 0x03030303u;
  word |= word >> 6;
  return (word & 0xfu) | (word >> 12 & 0xf0u);
}

// The upper half of a byte's range is negative for signed codes: `half` is 2^(bits - 1) for them, else 0.
CLUSTERQ_INLINE uint32_t unpack_word(uint32_t packed, int bits, uint32_t half) {
  uint32_t word;
  if (bits == 4) {
    word = (packed & 0xffu) | (packed & 0xff00u) << 8;
    word = (word | word << 4) & 0x0f0f0f0fu;
  } else {
    word = (packed & 0xfu) | (packed & 0xf0u) << 12;
    word = (word | word << 6) & 0x03030303u;
  }
  // Bytes that have the sign bit set get all bits above it: no borrow leaves a byte.
  const uint32_t sign = word & (half * 0x01010101u);
  return word | (half == 0 ? 0 : sign * ((0x100u - half) / half & 0xffu));
}

}  // namespace clusterq
