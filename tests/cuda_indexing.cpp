// Index arithmetic and formulas that the CUDA kernels share with the host compiler, against plain loops and divisions.
#include <array>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/indexing.h"
#include "numerics.h"

using namespace clusterq;

namespace {

int failures = 0;
int64_t checks = 0;

void expect(bool ok, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  ++checks;
  if (!ok && ++failures < 20)
    std::printf("%s: %lld %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b),
                static_cast<long long>(c));
}

std::mt19937_64 random_bits(5);
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

void dividers() {
  std::vector<int64_t> divisors{
      1, 2, 3, 5, 7, 64, 641, 65535, 65536, 65537, (1ll << 30) - 1, 1ll << 30, (1ll << 31) - 1};
  for (int i = 0; i < 200; ++i) divisors.push_back(1 + below(1ll << (1 + below(31))));
  for (const int64_t d : divisors) {
    const Divider divider(d);
    for (const bool small : {true, false}) {
      const int64_t limit = small ? 1ll << 31 : 1ll << 51;
      for (int i = 0; i < 2000; ++i) {
        // Multiples and their neighbours are where a quotient goes wrong first.
        const int64_t n = i % 2 ? below(limit) : below(limit / d) * d + below(3) - 1;
        if (n >= 0) expect(divider.quotient(n, small) == n / d, "quotient", n, d, small);
      }
    }
  }
  const int64_t wide = (1ll << 33) + 5;
  for (int i = 0; i < 2000; ++i) {
    const int64_t n = below(1ll << 51);
    expect(Divider(wide).quotient(n, false) == n / wide, "quotient", n, wide);
  }
}

// Every element of the tile finds the channel of its place, whether looked up or walked to.
void window(const Extent& extent, int64_t start, int64_t tile) {
  const Shape shape(extent);
  const int64_t end = start + tile < extent.numel ? start + tile : extent.numel;
  const Window view(shape, start, end);
  expect(view.slots <= runs_touched(tile, extent.inner) && view.slots <= extent.numel, "slots", start, view.slots);
  int walked = 0, left = 0;
  for (int64_t i = start; i < end; ++i) {
    const int64_t channel = i / extent.inner % extent.channels;
    int rest = 0;
    const int slot = view.slot(shape, i, rest);
    if (i == start) walked = slot, left = rest;
    expect(slot >= 0 && slot < view.slots, "slot", i, slot, view.slots);
    expect(view.channel(shape, slot) == channel, "channel of slot", i, extent.channels, extent.inner);
    // What is left of a run is counted up to 2^30.
    expect(walked == slot && (left == rest || rest == 1 << 30), "advance", i, extent.channels, extent.inner);
    view.advance(shape, walked, left);
  }
}

void windows() {
  for (const int64_t channels : {1, 2, 3, 7, 64, 1000})
    for (const int64_t inner : {1, 2, 3, 4, 7, 49, 1024}) {
      const Extent extent{3 * channels * inner, channels, inner};
      for (const int64_t tile : {4, 1024})
        for (int64_t start = 0; start < extent.numel; start += tile * (1 + below(1 + extent.numel / tile / 4)))
          window(extent, start, tile);
      // Past 2^31 elements, without memory for them.
      const int64_t outer = (int64_t(5) << 31) / (channels * inner);
      const Extent large{outer * channels * inner, channels, inner};
      for (const int64_t start : {int64_t(1) << 31, int64_t(3) << 31, large.numel / 1024 * 1024 - 1024})
        window(large, start, 1024);
    }
  const Extent long_runs{int64_t(3) << 33, 2, int64_t(3) << 32};
  window(long_runs, (int64_t(3) << 32) - 512, 1024);
}

void channel_walks() {
  for (const int64_t outer : {1, 2, 5})
    for (const int64_t channels : {1, 3, 8})
      for (const int64_t inner : {4, 8, 20}) {
        const Extent extent{outer * channels * inner, channels, inner};
        const ChannelWalk walk(extent, 4);
        std::vector<int> seen(extent.numel);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t pack = 0; pack < outer * inner / 4; ++pack)
            for (int v = 0; v < 4; ++v) {
              const int64_t at = walk.at(c, pack, 4) + v;
              const bool inside = at >= 0 && at < extent.numel;
              expect(inside && at / inner % channels == c, "place", c, pack, at);
              if (inside) ++seen[at];
            }
        for (const int count : seen) expect(count == 1, "visits", outer, channels, inner);
      }
  const Extent large{int64_t(1) << 34, 16, 64};
  const ChannelWalk walk(large, 4);
  for (int i = 0; i < 10000; ++i) {
    const int64_t run = below(int64_t(1) << 24), c = below(16), rest = below(16);
    expect(walk.at(c, run * 16 + rest, 4) == (run * 16 + c) * 64 + rest * 4, "place", c, run, rest);
  }
}

void entries() {
  struct Entry {
    int64_t first_block;
  };
  const Entry table[] = {{0}, {3}, {4}, {9}};
  const int wanted[] = {0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3};
  for (int block = 0; block < 12; ++block) expect(find_entry(table, 4, block) == wanted[block], "entry", block);
}

void codes() {
  for (const int bits : {2, 4})
    for (uint32_t packed = 0; packed < 1u << (4 * bits); ++packed)
      for (const bool is_signed : {false, true}) {
        const uint32_t half = is_signed ? 1u << (bits - 1) : 0;
        uint32_t word = 0;
        for (int j = 0; j < 4; ++j) {
          int code = packed >> (j * bits) & ((1 << bits) - 1);
          if (is_signed && code >= 1 << (bits - 1)) code -= 1 << bits;
          word |= static_cast<uint32_t>(code & 0xff) << (8 * j);
        }
        expect(unpack_word(packed, bits, half) == word, "unpack", packed, bits, is_signed);
        expect(pack_word(word, bits) == packed, "pack", packed, bits, is_signed);
      }
}

template <typename A>
bool same_bits(A a, A b) {
  return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b));
}

// The form of the CUDA kernels, with no rule in their code, is the template of the CPU kernels.
template <Rule kRule, typename A>
void masks() {
  constexpr A inf = std::numeric_limits<A>::infinity(), largest = std::numeric_limits<A>::max();
  std::uniform_real_distribution<A> uniform(-12, 12);
  for (const Activation<A> bounds : {Activation<A>{-inf, inf}, Activation<A>{0, inf}, Activation<A>{0, 6}})
    for (const A scale : {A(0.03), A(0.5), A(1), A(0.7)})
      for (const auto& [low, high, zero] : {std::array<A, 3>{0, 15, 4}, {-8, 7, 0}, {0, 255, 0}, {0, 3, 3}}) {
        const Grid<A> grid{scale, 1 / scale, zero, low, high};
        const Steps<A> steps = to_steps(grid, bounds);
        const Pass<A> start = to_pass(bounds, kRule), pass = kRule == Rule::kReal ? to_real(start, grid) : start;
        std::vector<A> xs{A(0), -A(0), A(6), inf, -inf, largest, -largest, std::numeric_limits<A>::quiet_NaN()};
        for (A code = low - 1; code <= high + 1; ++code)
          for (const A middle : {(code - zero) * scale, (code - zero + A(0.5)) * scale})
            for (const A to : {-inf, middle, inf}) xs.push_back(std::nextafter(middle, to));
        for (const A edge : {A(0), A(6)})
          for (const A to : {-inf, inf}) xs.push_back(std::nextafter(edge, to));
        for (int i = 0; i < 500; ++i) xs.push_back(uniform(random_bits));
        for (size_t i = 0; i < xs.size(); ++i) {
          const A x = xs[i];
          const Masked<A> wanted = masked_quantize<kRule>(x, grid, bounds);
          const bool inside = passes(x, round_even(x * steps.inverse), steps, pass, kRule != Rule::kCodes);
          expect(inside == (wanted.inside != 0), "mask", static_cast<int64_t>(kRule), static_cast<int64_t>(i), zero);
          expect(same_bits(fake_quantize(x, steps), wanted.value), "value", static_cast<int64_t>(kRule), i, zero);
        }
      }
}

}  // namespace

int main() {
  dividers();
  windows();
  channel_walks();
  entries();
  codes();
  masks<Rule::kCodes, float>();
  masks<Rule::kReal, float>();
  masks<Rule::kActivation, float>();
  masks<Rule::kCodes, double>();
  masks<Rule::kReal, double>();
  masks<Rule::kActivation, double>();
  std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
  return failures != 0;
}
