// Races on global memory: who wrote and read each pair of bytes of the tensors that a kernel may write.
//
// Blocks are not ordered among each other, but for this one pattern: a thread calls __threadfence and then an atomic;
// a thread of a later block that does an atomic on the same address knows all that the first one knew.
#pragma once

#include <sys/mman.h>

#include <map>
#include <unordered_map>

#include "banks.h"
#include "memory.h"
#include "shadow.h"

namespace emulate {

// Larger tensors are checked for bounds alone: the shadow has 12 bytes for each of theirs.
constexpr uint64_t TRACKED_BYTES = uint64_t(64) << 20;
constexpr uint64_t GRANULE = 2;

struct GlobalAccess {
  uint32_t cluster = 0;  // counted from 1: 0 is nobody
  uint32_t time = 0;
  uint32_t agent : 16, kind : 16;
};

struct GlobalCell {
  GlobalAccess write, read;
};

struct GlobalShadow {
  std::map<const Range*, GlobalCell*> cells;
  // What the running cluster has learnt of others, and what atomics on an address hand on: clocks by cluster.
  using Known = std::map<uint32_t, std::vector<uint32_t>>;
  Known known;
  std::unordered_map<const void*, Known> released;

  void open() {
    for (const Range& range : arena.ranges) {
      if (!range.writable || range.bytes > TRACKED_BYTES) continue;
      const size_t size = (range.bytes / GRANULE + 2) * sizeof(GlobalCell);
      void* got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (got != MAP_FAILED) cells[&range] = static_cast<GlobalCell*>(got);
    }
  }
  void close() {
    for (auto& [range, cell] : cells) munmap(cell, (range->bytes / GRANULE + 2) * sizeof(GlobalCell));
    cells.clear(), known.clear(), released.clear();
  }
};

inline GlobalShadow global_shadow;

inline bool ordered(const GlobalAccess& before, const Agent& agent, uint16_t kind) {
  if (before.cluster == 0 || (before.kind & kind & ATOMIC)) return true;
  if (before.cluster == state.cluster_number) return agent.knows(before.agent, before.time);
  const auto found = global_shadow.known.find(before.cluster);
  return found != global_shadow.known.end() && found->second[before.agent] >= before.time;
}

inline void fail_global_race(const Range& range, uint64_t byte, const char* mine, const char* theirs,
                             const GlobalAccess& before, uintptr_t pc) {
  const bool same = before.cluster == state.cluster_number;
  const int thread = int(before.agent) % state.threads();
  fail("race on global memory at byte %lu of argument %u: this %s @%lx is not ordered after the %s of thread %d of %s",
       (unsigned long)byte, range.argument, mine, (unsigned long)module_offset(pc), theirs, thread,
       same ? "the same block or cluster" : "another block");
}

inline void track_global(const Range& range, const void* pointer, size_t bytes, bool write, uintptr_t pc,
                         uint16_t kind) {
  const auto found = global_shadow.cells.find(&range);
  if (bytes < GRANULE || found == global_shadow.cells.end()) return;
  const Agent& agent = state.current->agent;
  const uint64_t first = static_cast<const unsigned char*>(pointer) - range.begin;
  for (uint64_t i = first / GRANULE; i <= (first + bytes - 1) / GRANULE; i++) {
    GlobalCell& cell = found->second[i];
    const char* mine = write ? "write" : "read";
    if (!ordered(cell.write, agent, kind)) return fail_global_race(range, i * GRANULE, mine, "write", cell.write, pc);
    const GlobalAccess now{state.cluster_number, agent.now, uint32_t(agent.index), kind};
    if (write) {
      if (!ordered(cell.read, agent, kind)) return fail_global_race(range, i * GRANULE, mine, "read", cell.read, pc);
      cell = GlobalCell{now, GlobalAccess{}};
    } else if (ordered(cell.read, agent, kind) || state.random.below(2)) {
      cell.read = now;
    }
  }
}

// An access to global memory (or to what is none of the kernel's memory, which fails).
inline void global_access(const void* pointer, size_t bytes, bool write, uintptr_t pc, uint16_t kind = PLAIN) {
  const Range* range = find_global(pointer, bytes, write, pc);
  if (!range) return;
  log_global(*state.current, pointer, bytes, pc);
  if (range->writable) track_global(*range, pointer, bytes, write, pc, kind);
  if (write && kind == PLAIN) state.current->fenced = false;
}

inline void merge_known(GlobalShadow::Known& into, const GlobalShadow::Known& from) {
  for (const auto& [cluster, times] : from) {
    std::vector<uint32_t>& mine = into[cluster];
    mine.resize(times.size());
    for (size_t i = 0; i < times.size(); i++) mine[i] = std::max(mine[i], times[i]);
  }
}

// An atomic on global memory: what was handed on there is known to this block; after a fence, what this thread knew
// is handed on.
inline void order_atomics(const void* address) {
  Fiber& me = *state.current;
  GlobalShadow::Known& released = global_shadow.released[address];
  merge_known(global_shadow.known, released);
  if (!me.fenced) return;
  merge_known(released, global_shadow.known);
  std::vector<uint32_t> mine = me.agent.base->at;
  mine[me.agent.index] = me.agent.now++;
  merge_known(released, {{state.cluster_number, mine}});
}

}  // namespace emulate
