// Runs a launch: cluster after cluster, and within a cluster each warp until it must wait, in orders the seed decides.
//
// A GPU promises no order of blocks, warps or lanes. Seed 0 takes them as they are numbered; any other seed shuffles
// them, and lets warps run ahead of each other by different amounts.
#pragma once

#include <numeric>

#include "barriers.h"
#include "global_shadow.h"
#include "hopper_wgmma.h"
#include "memory.h"
#include "shadow.h"
#include "state.h"

namespace emulate {

constexpr size_t SHARED_ALIGNMENT = 1024;

inline void shuffle(std::vector<int>& order) {
  if (state.launch->seed == 0) return;
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[state.random.below(uint32_t(i))]);
}

inline void leave_kernel(Fiber& fiber) {
  Block& block = *fiber.block;
  block.live--;
  for (int lane = 0; lane < fiber.warp_lanes; lane++) {
    Fiber& other = fiber.warp[lane];
    if (other.status == Status::COLLECTIVE && other.wait.mask >> fiber.lane & 1) {
      fail("leaves the kernel, but lane %d waits for it in %s of mask %08x @%lx", other.lane, other.wait.what,
           other.wait.mask, (unsigned long)module_offset(other.wait.pc));
    }
  }
  for (Barrier* barrier : {&block.barriers[0], &state.cluster_barrier}) {
    if (!barrier->waiting.empty()) {
      const Fiber& other = *barrier->waiting[0];
      fail("leaves the kernel, but thread %d waits for it in %s @%lx", other.thread, other.wait.what,
           (unsigned long)module_offset(other.wait.pc));
    }
  }
  for (size_t agent = 0; block.live == 0 && agent < block.readers.size(); agent++) {
    if (block.readers[agent] && !fiber.agent.knows(uint32_t(agent), block.readers[agent])) {
      fail(
          "leaves the kernel as the last of its block, whose shared memory thread %d of block rank %d may still read: "
          "a cluster_sync must come before",
          int(agent) % state.threads(), int(agent) / state.threads());
    }
  }
  if (!fiber.copies.empty() || !fiber.groups.empty()) {
    fail("leaves the kernel with cp_async copies that it has not waited for");
  }
  check_stores_waited(fiber), check_products_waited(fiber);
  if (block.live == 0) check_loads_waited(block);
}

inline void fiber_entry() {
  state.launch->call(state.launch->parameters);
  Fiber& fiber = *state.current;
  leave_kernel(fiber);
  fiber.status = Status::DONE;
  yield_fiber();
  abort();
}

inline bool runnable(const Fiber& fiber) {
  return fiber.status == Status::READY || (fiber.status == Status::WAITING && fiber.wait.ready(fiber.wait.argument));
}

inline bool resume(Fiber& fiber) {
  if (!runnable(fiber)) return false;
  fiber.status = Status::READY;
  state.accesses = 0;
  state.current = &fiber;
  switch_context(state.scheduler, fiber.context);
  state.current = nullptr;
  if (*reinterpret_cast<uint64_t*>(fiber.stack) != STACK_END) {
    *reinterpret_cast<uint64_t*>(fiber.stack) = STACK_END;
    state.current = nullptr;
    fail("thread %d has more than %zu bytes of local variables, which is the emulator's limit", fiber.thread,
         STACK_BYTES);
  }
  return true;
}

// Storage of the blocks of a cluster, kept between launches.
struct Storage {
  std::vector<unsigned char> shared;
  std::vector<uint8_t> flags;
  std::vector<Cell> cells;
};

inline Storage storage;

inline size_t rounded_shared() {
  return (state.launch->shared_bytes + SHARED_ALIGNMENT) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
}

inline void place_block(Block& block, int rank) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(storage.shared.data()) + SHARED_ALIGNMENT - 1;
  block.shared = reinterpret_cast<unsigned char*>(base / SHARED_ALIGNMENT * SHARED_ALIGNMENT) + rank * rounded_shared();
  block.flags = storage.flags.data() + rank * rounded_shared();
  block.cells = storage.cells.data() + rank * rounded_shared();
  block.rank = rank;
}

// Fibers and blocks for clusters of this launch; false without memory for the stacks.
inline bool allocate() {
  const int threads = state.threads(), blocks = state.cluster_size;
  storage.shared.resize(blocks * rounded_shared() + SHARED_ALIGNMENT);
  storage.flags.resize(blocks * rounded_shared());
  storage.cells.assign(blocks * rounded_shared(), Cell{});
  unsigned char* stack = stacks(size_t(threads) * blocks);
  if (!stack) return false;
  state.blocks.assign(blocks, Block{});
  state.fibers.assign(size_t(threads) * blocks, Fiber{});
  state.events.clear(), hopper_allocate();  // before the clocks that they hold
  clocks.resize(agent_count(threads, blocks));
  clocks.reset();
  for (int i = 0; i < threads * blocks; i++) {
    Fiber& fiber = state.fibers[i];
    fiber.stack = stack + size_t(i) * STACK_BYTES;
    fiber.thread = i % threads, fiber.lane = fiber.thread % LANES;
    fiber.block = &state.blocks[i / threads];
    fiber.warp = &fiber - fiber.lane;
    fiber.warp_lanes = std::min(LANES, threads - (fiber.thread - fiber.lane));
    fiber.agent.index = i;
  }
  return true;
}

// A new cluster: everything that ran before is known to all, shared memory is poison that nobody has written.
inline void begin_cluster(Dim3 first) {
  Clock* start = clocks.make();
  for (const Fiber& fiber : state.fibers) start->at[fiber.agent.index] = fiber.agent.now;
  hopper_begin(start);
  for (Fiber& fiber : state.fibers) {
    clocks.drop(fiber.agent.base);
    fiber.agent.base = clocks.share(start), fiber.agent.now++;
    fiber.fenced = false;
    fiber.status = Status::READY;
    prepare_context(fiber.context, fiber.stack, fiber_entry);
  }
  clocks.drop(start);
  for (int rank = 0; rank < state.cluster_size; rank++) {
    Block& block = state.blocks[rank];
    block = Block{};
    block.index = Dim3{first.x + rank, first.y, first.z};
    block.live = state.threads();
    place_block(block, rank);
    memset(block.shared, 0xff, state.launch->shared_bytes);
    memset(block.flags, 0, state.launch->shared_bytes);
  }
  state.cluster_barrier = Barrier{};
  state.events.clear();
  state.cluster_number++;
  global_shadow.known.clear();
}

inline void fail_deadlock() {
  std::string waits;
  int told = 0, waiting = 0;
  const Fiber* before = nullptr;
  for (const Fiber& fiber : state.fibers) {
    if (fiber.status == Status::DONE) continue;
    waiting++;
    if (before && before->wait.pc == fiber.wait.pc && before->block == fiber.block) continue;
    before = &fiber;
    if (told++ == 8) waits += "; ...";
    if (told > 8) continue;
    char text[256];
    snprintf(text, sizeof text, "%sfrom thread %d of block (%u, %u, %u) on in %s @%lx", told > 1 ? "; " : "",
             fiber.thread, fiber.block->index.x, fiber.block->index.y, fiber.block->index.z, fiber.wait.what,
             (unsigned long)module_offset(fiber.wait.pc));
    waits += text;
  }
  fail("deadlock: %d threads wait for ever: %s", waiting, waits.c_str());
}

// Lets one asynchronous event happen; false if there is none.
inline bool complete_event() {
  if (state.events.empty()) return false;
  const size_t i = state.launch->seed ? state.random.below(uint32_t(state.events.size())) : 0;
  std::function<void()> work = std::move(state.events[i]);
  state.events.erase(state.events.begin() + i);
  work();
  return true;
}

// Runs a warp's lanes until all wait, or at most `turns` times.
inline bool run_warp(Fiber* warp, const std::vector<int>& lanes, int turns) {
  bool progress = false;
  for (int turn = 0; turn < turns && !state.failed; turn++) {
    bool any = false;
    for (int lane : lanes) {
      if (lane < warp->warp_lanes && !state.failed) any |= resume(warp[lane]);
    }
    if (!any) break;
    progress = true;
  }
  return progress;
}

inline void run_cluster() {
  const int threads = state.threads(), warps = (threads + LANES - 1) / LANES;
  std::vector<int> order(warps * state.cluster_size), lanes(LANES);
  std::iota(order.begin(), order.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  while (!state.failed) {
    shuffle(order), shuffle(lanes);
    bool progress = false;
    for (int number : order) {
      Fiber* warp = &state.fibers[number / warps * threads + number % warps * LANES];
      const bool hurry = state.launch->seed == 0 || state.random.below(2);
      progress |= run_warp(warp, lanes, hurry ? INT32_MAX : 1 + state.random.below(4));
      if (state.failed) return;
      // Copies complete now or much later; a kernel must not count on either.
      if (state.launch->seed && state.random.below(8) == 0) progress |= complete_event();
    }
    if (progress) continue;
    if (complete_event()) continue;
    int live = 0;
    for (const Block& block : state.blocks) live += block.live;
    if (live) fail_deadlock();
    break;
  }
  for (Fiber& fiber : state.fibers) {
    if (fiber.lane == 0 && !state.failed) flush_log(&fiber);
  }
}

inline void run_grid() {
  const Launch& launch = *state.launch;
  const int clusters = launch.grid[0] / launch.cluster * launch.grid[1] * launch.grid[2];
  std::vector<int> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  state.cluster_number = 0;
  for (int number : order) {
    const uint32_t x = launch.grid[0] / launch.cluster, rest = number / x;
    begin_cluster(Dim3{number % x * launch.cluster, rest % launch.grid[1], rest / launch.grid[1]});
    run_cluster();
    if (state.failed) return;
  }
}

}  // namespace emulate
