// Global memory: the launch's tensors, each copied far from all others, so that whatever leaves one is seen to do so.
#pragma once

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <string>

#include "state.h"

namespace emulate {

// Between two tensors lies this much of nothing: no index that is wrong by a few rows reaches a neighbour.
constexpr uint64_t GAP_BYTES = uint64_t(1) << 32;
constexpr uint64_t ALIGNMENT = 4096;

struct Range {
  unsigned char* begin;
  uint64_t bytes;
  bool writable;
  uint32_t argument;  // PARAMETERS: the kernel's own parameters
  unsigned char* host;
};

constexpr uint32_t PARAMETERS = ~0u;

struct Arena {
  std::vector<Range> ranges;
  unsigned char* base = nullptr;
  uint64_t size = 0;
  size_t last = 0;  // the range hit last

  const Range* find(const void* pointer) {
    const unsigned char* p = static_cast<const unsigned char*>(pointer);
    if (last < ranges.size() && uint64_t(p - ranges[last].begin) < ranges[last].bytes) return &ranges[last];
    for (size_t i = 0; i < ranges.size(); i++) {
      if (uint64_t(p - ranges[i].begin) < ranges[i].bytes) return last = i, &ranges[i];
    }
    return nullptr;
  }

  // The arena's address of `host`, a byte of a region; else `host` itself.
  unsigned char* translate(unsigned char* host) const {
    for (const Range& range : ranges) {
      if (range.host && uint64_t(host - range.host) <= range.bytes) return range.begin + (host - range.host);
    }
    return host;
  }

  bool open(const Launch& launch) {
    ranges.clear(), last = 0;
    size = (launch.region_count + 1) * GAP_BYTES;
    for (uint32_t i = 0; i < launch.region_count; i++) size += launch.regions[i].bytes + 2 * ALIGNMENT;
    void* got = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) {
      base = nullptr;
      return false;
    }
    base = static_cast<unsigned char*>(got);
    unsigned char* at = base + GAP_BYTES;
    for (uint32_t i = 0; i < launch.region_count; i++) {
      const Region& region = launch.regions[i];
      const uint64_t phase = reinterpret_cast<uintptr_t>(region.host) % ALIGNMENT;
      const uint64_t whole = (phase + region.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
      if (mprotect(at, whole, PROT_READ | PROT_WRITE) != 0) return false;
      memcpy(at + phase, region.host, region.bytes);
      ranges.push_back(Range{at + phase, region.bytes, region.writable != 0, region.argument, region.host});
      at += whole + GAP_BYTES;
    }
    ranges.push_back(Range{launch.parameter_bytes, launch.parameter_size, false, PARAMETERS, nullptr});
    return true;
  }

  // Copies what the kernel wrote back into the tensors.
  void close(bool keep) {
    if (!base) return;
    for (const Range& range : ranges) {
      if (keep && range.host && range.writable) memcpy(range.host, range.begin, range.bytes);
    }
    munmap(base, size);
    base = nullptr;
  }
};

inline Arena arena;

// Constants that the kernel's file defines lie in the library itself.
bool in_module(const void* pointer);

inline void fail_outside(const void* pointer, size_t bytes, const char* verb, uint32_t where) {
  for (const Fiber& fiber : state.fibers) {
    if (size_t(static_cast<const unsigned char*>(pointer) - fiber.stack) < STACK_BYTES) {
      return fail("%s %zu bytes @%x of the local variables of thread %d", verb, bytes, where, fiber.thread);
    }
  }
  if (reinterpret_cast<uintptr_t>(pointer) < 65536)
    return fail("%s %zu bytes @%x at the null pointer: is an optional tensor missing?", verb, bytes, where);
  const Block& own = *state.current->block;
  const int64_t shared = static_cast<const unsigned char*>(pointer) - own.shared;
  if (shared >= -65536 && shared < int64_t(state.launch->shared_bytes) + 65536) {
    return fail(
        "%s %zu bytes @%x at byte %ld of shared memory, which has %u: give the kernel more shared_bytes, or "
        "mend the index",
        verb, bytes, where, long(shared), state.launch->shared_bytes);
  }
  const Range* nearest = nullptr;
  int64_t best = INT64_MAX;
  for (const Range& range : arena.ranges) {
    const int64_t distance = llabs(static_cast<const unsigned char*>(pointer) - range.begin);
    if (range.argument != PARAMETERS && distance < best) best = distance, nearest = &range;
  }
  if (nearest && uint64_t(best) < GAP_BYTES) {
    return fail("%s %zu bytes @%x outside global memory: at byte %ld of argument %u, whose tensor has %lu", verb, bytes,
                where, long(static_cast<const unsigned char*>(pointer) - nearest->begin), nearest->argument,
                (unsigned long)nearest->bytes);
  }
  fail("%s %zu bytes @%x at %p, which is neither a tensor of this launch, nor shared memory, nor a local variable",
       verb, bytes, where, pointer);
}

// The range of an access to global memory; null after an error, or for what is not tracked.
inline const Range* find_global(const void* pointer, size_t bytes, bool write, uintptr_t pc) {
  const char* verb = write ? "writes" : "reads";
  const Range* range = arena.find(pointer);
  if (!range || static_cast<const unsigned char*>(pointer) + bytes > range->begin + range->bytes) {
    if (!range && !write && in_module(pointer)) return nullptr;
    fail_outside(pointer, bytes, verb, uint32_t(module_offset(pc)));
    return nullptr;
  }
  if (write && !range->writable) {
    fail("writes %zu bytes @%lx of argument %u, which the kernel takes as const", bytes,
         (unsigned long)module_offset(pc), range->argument);
    return nullptr;
  }
  if (range->argument == PARAMETERS) return nullptr;
  (write ? state.report.global_written_bytes : state.report.global_read_bytes) += bytes;
  return range;
}

}  // namespace emulate
