// The state of a launch: fibers in warps in blocks in a cluster, what each waits for, and how a launch fails.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <deque>
#include <functional>
#include <vector>

#include "clock.h"
#include "fiber.h"

namespace emulate {

struct Dim3 {
  uint32_t x, y, z;
};

constexpr int LANES = 32;

enum class Status : uint8_t { READY, COLLECTIVE, BARRIER, WAITING, DONE };

struct Fiber;
using Act = void (*)(Fiber* warp, uint32_t mask);

// What a fiber that is not READY waits for; kept for the report of a deadlock too.
struct Wait {
  const char* what = "";
  uintptr_t pc = 0;
  uint32_t mask = 0;               // a warp's collective: the lanes it names,
  void* payload = nullptr;         // what this lane brings (on its own stack),
  Act act = nullptr;               // and what the lane that comes last does for all
  bool (*ready)(void*) = nullptr;  // WAITING: polled by the scheduler
  void* argument = nullptr;
};

struct AsyncCopy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;
  bool valid;
  uintptr_t pc;
};

// One access of one lane, kept until its warp synchronises: see banks.h.
struct Logged {
  uintptr_t pc;
  uint64_t place;  // offset in shared memory, or address in global memory
  uint8_t bytes;
  bool global;
};

struct Block;

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  Status status = Status::DONE;
  int thread = 0;  // in the block
  int lane = 0;    // in the warp
  Block* block = nullptr;
  Fiber* warp = nullptr;  // lane 0 of its warp
  int warp_lanes = 0;
  Agent agent;                // agent.index: the thread in the cluster
  bool accumulators = false;  // has some that wgmma writes: accesses to its stack are checked
  Wait wait;
  std::vector<AsyncCopy> copies;              // issued, in no group yet
  std::deque<std::vector<AsyncCopy>> groups;  // committed, oldest first
  std::vector<Logged> log;
  bool fenced = false;  // __threadfence since its last store to global memory
};

struct Barrier {
  int expected = 0, arrived = 0;
  int line = 0, count = 0;  // __syncthreads: its line, how many predicates held (and of the last phase, below)
  int last_count = 0;
  Release release;
  std::vector<Fiber*> waiting;
};

constexpr int BARRIERS = 16;

struct Cell;

struct Block {
  Dim3 index{};
  int rank = 0;  // in the cluster
  int live = 0;  // threads that have not returned
  unsigned char* shared = nullptr;
  uint8_t* flags = nullptr;  // one per byte of shared memory: see shadow.h
  Cell* cells = nullptr;
  Barrier barriers[BARRIERS];
  std::vector<uint32_t> readers;  // by agent of another block: when it last read this one's shared memory
};

// What the last launch did; the same struct in emulated.py.
struct Report {
  uint64_t bank_conflicts = 0;     // cycles that shared memory was busy beyond the least its accesses need
  uint64_t shared_wavefronts = 0;  // cycles in all
  uint64_t global_read_bytes = 0, global_written_bytes = 0;
  uint64_t global_sectors = 0;  // of 32 bytes, which is what memory moves: counted once for each access of a warp
  uint64_t barriers = 0, collectives = 0, switches = 0;
};

// The launch as Python describes it; the same struct in emulated.py.
struct Region {
  unsigned char* host;
  uint64_t bytes;
  uint32_t writable;
  uint32_t argument;  // the first parameter that points there
};

// A TensorMap parameter as the emulator has it (emulated.py packs it): dims innermost first.
struct EncodedMap {
  unsigned char* base;  // in the launch's copy of the tensor
  uint64_t strides_bytes[4];
  uint32_t shape[5], box[5];
  uint32_t rank, element_bytes, swizzle;
};

struct Launch {
  const char* kernel;
  void (*call)(const void* const* parameters);
  uint32_t grid[3];
  uint32_t threads, shared_bytes, cluster;
  uint64_t seed;
  const void* const* parameters;
  unsigned char* parameter_bytes;  // the memory that holds the parameters: readable by the kernel
  uint64_t parameter_size;
  const Region* regions;
  uint32_t region_count, message_size;
  char* message;
  Report* report;
};

// A sequence of numbers that the seed decides: orders of blocks, warps, lanes, and of what completes when.
struct Random {
  uint64_t state = 1;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t n) { return uint32_t((next() >> 32) * n >> 32); }
};

struct State {
  const Launch* launch = nullptr;
  int cluster_size = 1;
  uint32_t cluster_number = 0;  // of the cluster that runs, from 1 on
  uint64_t accesses = 0;        // since a fiber was last resumed
  std::vector<Fiber> fibers;    // of the cluster, block by block
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  // Asynchronous work that has been issued and completes later: each runs once, in an order the seed decides.
  std::vector<std::function<void()>> events;
  Fiber* current = nullptr;  // null while the scheduler runs
  Context scheduler;
  Random random;
  Report report;
  bool failed = false;

  int threads() const { return int(launch->threads); }
};

inline State state;

// Back to the scheduler; returns when it resumes this fiber.
inline void yield_fiber() {
  Fiber* fiber = state.current;
  state.report.switches++;
  switch_context(fiber->context, state.scheduler);
}

inline void describe_thread(char* text, size_t size, const Fiber* fiber) {
  const Dim3 b = fiber->block->index;
  snprintf(text, size, "block (%u, %u, %u), thread %d", b.x, b.y, b.z, fiber->thread);
}

// The address as emulated.py's report resolves it to a source line: "@1234ab" is an offset in the kernel's library.
uintptr_t module_offset(uintptr_t pc);

// Ends the launch with an error; from a fiber it does not return (the fiber is abandoned).
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  const Launch& launch = *state.launch;
  if (!state.failed) {
    char who[96] = "";
    if (state.current) describe_thread(who, sizeof who, state.current);
    const int used = snprintf(launch.message, launch.message_size, "%s: %s%s", launch.kernel, who, *who ? ": " : "");
    va_list arguments;
    va_start(arguments, format);
    if (used < int(launch.message_size)) {
      vsnprintf(launch.message + used, launch.message_size - used, format, arguments);
    }
    va_end(arguments);
    state.failed = true;
  }
  if (state.current) {
    state.current->status = Status::DONE;
    yield_fiber();
    abort();
  }
}

// Waits until `ready(argument)`; the scheduler polls it. `what` names it in the report of a deadlock.
inline void wait_until(const char* what, uintptr_t pc, bool (*ready)(void*), void* argument) {
  while (!ready(argument)) {
    Fiber& me = *state.current;
    me.wait = Wait{what, pc, 0, nullptr, nullptr, ready, argument};
    me.status = Status::WAITING;
    yield_fiber();
  }
}

// `work` happens some time after this: latest when nothing else can go on.
inline void post_event(std::function<void()> work) { state.events.push_back(std::move(work)); }

}  // namespace emulate
