// What the lanes of a warp do together: each brings a payload, the lane that comes last acts for all.
#pragma once

#include "banks.h"
#include "state.h"

namespace emulate {

inline int popcount(uint32_t mask) { return __builtin_popcount(mask); }

inline void fail_absent(const char* what, uint32_t mask, int lane, const char* why) {
  fail("%s of mask %08x names lane %d, which %s", what, mask, lane, why);
}

// All lanes in `mask` meet here; a lane that is missing for good, or that has come for something else, is an error.
inline void collective(const char* what, uint32_t mask, void* payload, Act act, uintptr_t pc) {
  Fiber& me = *state.current;
  Fiber* warp = me.warp;
  if (!(mask >> me.lane & 1))
    return fail("%s of mask %08x, which does not name the calling lane %d", what, mask, me.lane);
  me.wait = Wait{what, pc, mask, payload, act, nullptr, nullptr};
  bool missing = false;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1) || lane == me.lane) continue;
    if (lane >= me.warp_lanes) return fail_absent(what, mask, lane, "the block does not have");
    const Fiber& other = warp[lane];
    if (other.status == Status::DONE) return fail_absent(what, mask, lane, "has left the kernel");
    if (other.status != Status::COLLECTIVE) {
      missing = true;
    } else if (other.wait.act != act || other.wait.mask != mask) {
      return fail("%s of mask %08x @%lx, where lane %d is at %s of mask %08x @%lx: the lanes have diverged", what, mask,
                  (unsigned long)module_offset(pc), lane, other.wait.what, other.wait.mask,
                  (unsigned long)module_offset(other.wait.pc));
    }
  }
  if (missing) {
    me.status = Status::COLLECTIVE;
    return yield_fiber();
  }
  state.report.collectives++;
  act(warp, mask);
  for (int lane = 0; lane < me.warp_lanes; lane++) {
    if (mask >> lane & 1) warp[lane].status = Status::READY;
  }
  if (popcount(mask) == me.warp_lanes) flush_log(warp);
}

template <class P>
P& payload_of(Fiber* warp, int lane) {
  return *static_cast<P*>(warp[lane].wait.payload);
}

// ---- shuffles, votes, __syncwarp

struct Shuffle {
  uint64_t bits, result;
  int source;
};

inline void act_shuffle(Fiber* warp, uint32_t mask) {
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    Shuffle& mine = payload_of<Shuffle>(warp, lane);
    if (!(mask >> mine.source & 1)) {
      return fail_absent(warp[lane].wait.what, mask, mine.source,
                         "is read but not in the mask (its value is undefined on a GPU)");
    }
    mine.result = payload_of<Shuffle>(warp, mine.source).bits;
  }
}

struct Vote {
  bool predicate;
  uint32_t result;
};

inline void act_ballot(Fiber* warp, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (mask >> lane & 1 && payload_of<Vote>(warp, lane).predicate) votes |= 1u << lane;
  }
  for (int lane = 0; lane < LANES; lane++) {
    if (mask >> lane & 1) payload_of<Vote>(warp, lane).result = votes;
  }
}

// Only __syncwarp orders memory among lanes: shuffles, votes and matrix instructions promise no such thing.
inline void act_syncwarp(Fiber* warp, uint32_t mask) {
  Release release;
  for (int lane = 0; lane < LANES; lane++) {
    if (mask >> lane & 1) release.arrive(warp[lane].agent);
  }
  Clock* clock = release.seal();
  for (int lane = 0; lane < LANES; lane++) {
    if (mask >> lane & 1) acquire(warp[lane].agent, clock, true);
  }
  clocks.drop(clock);
}

}  // namespace emulate

extern "C" {
uint64_t emulate_shuffle(int kind, uint32_t mask, uint64_t bits, int operand, int width) {
  using namespace emulate;
  static const char* const NAMES[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync"};
  const int lane = state.current->lane, group = lane / width * width, place = lane % width;
  const int wanted[] = {operand & (width - 1), place ^ operand, place - operand, place + operand};
  const bool inside = wanted[kind] >= 0 && wanted[kind] < width;
  Shuffle shuffle{bits, 0, inside ? group + wanted[kind] : lane};
  collective(NAMES[kind], mask, &shuffle, act_shuffle, EMULATE_PC);
  return shuffle.result;
}

uint32_t emulate_ballot(uint32_t mask, int predicate) {
  emulate::Vote vote{predicate != 0, 0};
  emulate::collective("__ballot_sync", mask, &vote, emulate::act_ballot, EMULATE_PC);
  return vote.result;
}

void emulate_syncwarp(uint32_t mask) {
  emulate::collective("__syncwarp", mask, nullptr, emulate::act_syncwarp, EMULATE_PC);
}
}
