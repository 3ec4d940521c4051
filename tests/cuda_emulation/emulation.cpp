// A grid on the CPU: the threads of a block are fibers that take turns at barriers, blocks follow each other. Threads
// and blocks run in an order that changes from launch to launch, so that a missing barrier shows.
// Leaving a stack by longjmp is the point here: no check of it.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "emulated_launch.h"

extern "C" {
int emulated_capture = 0;
unsigned long long emulated_stream_id = 0;
// Launches so far.
long long emulated_launches = 0;
}

namespace emulation {

Index current_thread, current_block, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 * 1024;
enum class State { kReady, kAtBlock, kAtWarp, kEnded };

// A context makes the stack; switching by longjmp then spares its system calls.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kEnded;
};

std::vector<Fiber> fibers;
std::vector<std::array<char, 16>> slots;
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;

void leave(unsigned self) {
  if (_setjmp(fibers[self].place) == 0) _longjmp(scheduler, 1);
}

// A fiber runs its thread of one block after the other.
void entry() {
  const unsigned self = current_thread.x;
  for (;;) {
    (*kernel)();
    fibers[self].state = State::kEnded;
    leave(self);
  }
}

void wait(State state) {
  const unsigned self = current_thread.x;
  fibers[self].state = state;
  leave(self);
}

// Not inline: its frame has to be there when the fiber comes back.
__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, entry, 0);
  setcontext(&fiber.context);
}

void run_block(unsigned threads, unsigned turn) {
  for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::kReady;
  for (;;) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      // An odd step visits every one of 2^n threads.
      const unsigned t = threads & (threads - 1) ? i : (i * (2 * turn + 1) + turn) % threads;
      if (fibers[t].state != State::kReady) continue;
      current_thread.x = t;
      resume(fibers[t]);
      moved = true;
    }
    bool all_ended = true, all_at_block = true;
    for (unsigned first = 0; first < threads; first += 32) {
      unsigned waiting = 0, ended = 0;
      for (unsigned t = first; t < first + 32; ++t) {
        waiting += fibers[t].state == State::kAtWarp;
        ended += fibers[t].state == State::kEnded;
        all_ended &= fibers[t].state == State::kEnded;
        all_at_block &= fibers[t].state == State::kAtBlock || fibers[t].state == State::kEnded;
      }
      if (waiting < 32) continue;
      for (unsigned t = first; t < first + 32; ++t) fibers[t].state = State::kReady;
      moved = true;
    }
    if (all_ended) return;
    if (all_at_block) {
      for (unsigned t = 0; t < threads; ++t)
        if (fibers[t].state == State::kAtBlock) fibers[t].state = State::kReady;
      moved = true;
    }
    if (!moved) {
      std::fprintf(stderr, "emulation: threads of a block wait for each other at different barriers\n");
      std::abort();
    }
  }
}

}  // namespace

void block_barrier() { wait(State::kAtBlock); }
void warp_barrier() { wait(State::kAtWarp); }
void* lane_slot(int lane) { return slots[current_thread.x / 32 * 32 + lane].data(); }

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  if (blocks == 0 || threads == 0 || threads % 32 != 0 || threads > 1024) {
    std::fprintf(stderr, "emulation: a grid of %u blocks of %u threads\n", blocks, threads);
    std::abort();
  }
  const unsigned turn = static_cast<unsigned>(emulated_launches++);
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  slots.resize(fibers.size());
  kernel = &body;
  block_size.x = threads;
  grid_size.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    current_block.x = (b + turn) % blocks;
    run_block(threads, turn + b);
  }
}

}  // namespace emulation
