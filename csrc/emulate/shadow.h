// What is known of each byte of shared memory: written at all, being written by a copy under way, and by whom last.
#pragma once

#include "state.h"

namespace emulate {

enum Flag : uint8_t {
  INITIALISED = 1,
  LANDING = 2,  // an asynchronous copy will write here: nobody may touch it until it has landed
  LEAVING = 4,  // in units of this: asynchronous reads under way, until which nobody may write here
};

struct Access {
  uint32_t time = 0;
  uint16_t agent = 0;
  uint16_t kind = 0;  // ATOMIC, or free for the proxies of Hopper
  uint32_t pc = 0;    // offset in the kernel's library
};

enum : uint16_t { PLAIN = 0, ATOMIC = 1 };

// Reads that know of each other need one entry; of more concurrent ones than fit, a random choice is kept.
constexpr int READERS = 3;

struct Cell {
  Access write;
  Access reads[READERS];
};

// The block of the running cluster whose shared memory has `pointer`, or null.
inline Block* block_of_shared(const void* pointer) {
  for (Block& block : state.blocks) {
    const size_t offset = static_cast<const unsigned char*>(pointer) - block.shared;
    if (offset < state.launch->shared_bytes) return &block;
  }
  return nullptr;
}

// Another block's thread reads `block`'s shared memory: the block must not be gone before.
inline void note_reader(Block& block, const Agent& agent) {
  block.readers.resize(agent.base->at.size());
  block.readers[agent.index] = agent.now;
}

// "write of thread 3 of block rank 0", or which asynchronous work it was: hopper_state.h.
void describe_access(char* text, size_t size, const char* kind, int agent);

inline void fail_race(const char* mine, uintptr_t where, size_t offset, const char* theirs, const Access& other) {
  char access[128];
  describe_access(access, sizeof access, theirs, other.agent);
  fail(
      "race on shared memory at byte %zu: %s @%lx is not ordered after the %s @%x; a barrier (or __syncwarp within a "
      "warp) must stand between them",
      offset, mine, (unsigned long)where, access, other.pc);
}

inline void shadow_read(Block& block, const Agent& agent, size_t offset, size_t bytes, uintptr_t pc,
                        uint16_t kind = PLAIN) {
  const uint32_t where = uint32_t(module_offset(pc));
  for (size_t i = offset; i < offset + bytes; i++) {
    const uint8_t flags = block.flags[i];
    if (!(flags & INITIALISED) || flags & LANDING) {
      return fail("reads byte %zu of shared memory @%x, %s", i, where,
                  flags & LANDING ? "which an asynchronous copy is still to write: wait for the copy first"
                                  : "which nothing has written");
    }
    Cell& cell = block.cells[i];
    if (!agent.knows(cell.write.agent, cell.write.time) && !(kind & cell.write.kind & ATOMIC)) {
      return fail_race("this read", where, i, "write", cell.write);
    }
    Access* slot = nullptr;
    for (Access& read : cell.reads) {
      if (agent.knows(read.agent, read.time)) {
        slot = &read;
        break;
      }
    }
    if (!slot) slot = &cell.reads[state.random.below(READERS)];
    *slot = Access{agent.now, uint16_t(agent.index), kind, where};
  }
}

inline void check_write(Block& block, const Agent& agent, size_t i, uint32_t where, uint16_t kind) {
  const uint8_t flags = block.flags[i];
  if (flags >= LANDING) {
    return fail("writes byte %zu of shared memory @%x, which an asynchronous copy under way %s", i, where,
                flags & LANDING ? "writes too" : "still reads");
  }
  const Cell& cell = block.cells[i];
  if (!agent.knows(cell.write.agent, cell.write.time) && !(kind & cell.write.kind & ATOMIC)) {
    return fail_race("this write", where, i, "write", cell.write);
  }
  for (const Access& read : cell.reads) {
    if (!agent.knows(read.agent, read.time) && !(kind & read.kind & ATOMIC)) {
      return fail_race("this write", where, i, "read", read);
    }
  }
}

inline void shadow_write(Block& block, const Agent& agent, size_t offset, size_t bytes, uintptr_t pc,
                         uint16_t kind = PLAIN) {
  const uint32_t where = uint32_t(module_offset(pc));
  for (size_t i = offset; i < offset + bytes; i++) {
    check_write(block, agent, i, where, kind);
    block.flags[i] |= INITIALISED;
    block.cells[i] = Cell{{agent.now, uint16_t(agent.index), kind, where}, {}};
  }
}

// An asynchronous write is issued by `agent`: it is checked as one, and the bytes are nobody's until it has landed.
inline void shadow_begin_landing(Block& block, const Agent& agent, size_t offset, size_t bytes, uintptr_t pc) {
  const uint32_t where = uint32_t(module_offset(pc));
  for (size_t i = offset; i < offset + bytes; i++) {
    check_write(block, agent, i, where, PLAIN);
    block.flags[i] |= LANDING;
  }
}

// It lands: from here on an access of `agent` (the issuer, or its asynchronous twin) at `time`.
inline void shadow_land(Block& block, int agent, uint32_t time, size_t offset, size_t bytes, uintptr_t pc) {
  const uint32_t where = uint32_t(module_offset(pc));
  for (size_t i = offset; i < offset + bytes; i++) {
    block.flags[i] = uint8_t((block.flags[i] & ~LANDING) | INITIALISED);
    block.cells[i] = Cell{{time, uint16_t(agent), PLAIN, where}, {}};
  }
}

// An asynchronous read is issued by `agent`, and ends later: until then the bytes must not change.
inline void shadow_begin_leaving(Block& block, const Agent& agent, size_t offset, size_t bytes, uintptr_t pc) {
  shadow_read(block, agent, offset, bytes, pc);
  for (size_t i = offset; i < offset + bytes; i++) block.flags[i] += LEAVING;
}

inline void shadow_end_leaving(Block& block, size_t offset, size_t bytes) {
  for (size_t i = offset; i < offset + bytes; i++) block.flags[i] -= LEAVING;
}

}  // namespace emulate
