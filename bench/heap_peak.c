// Preloaded before a process starts: counts the bytes that it holds on the heap, and the most since the last reset.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static long held, peak, base;

static void* taken(void* block) {
  if (block == NULL) return block;
  const long now = __atomic_add_fetch(&held, (long)malloc_usable_size(block), __ATOMIC_RELAXED);
  long most = __atomic_load_n(&peak, __ATOMIC_RELAXED);
  while (now > most && !__atomic_compare_exchange_n(&peak, &most, now, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return block;
}

static void given_back(void* block) {
  if (block != NULL) __atomic_sub_fetch(&held, (long)malloc_usable_size(block), __ATOMIC_RELAXED);
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  void* found = taken(__libc_memalign(alignment, size));
  if (found == NULL) return ENOMEM;
  *block = found;
  return 0;
}

void* realloc(void* block, size_t size) {
  given_back(block);
  return taken(__libc_realloc(block, size));
}

void free(void* block) {
  given_back(block);
  __libc_free(block);
}

// What was held beyond the reset.
long heap_peak(void) { return peak - base; }

void heap_reset(void) {
  base = held;
  peak = held;
}
