// Counts bank conflicts: what the lanes of a warp access by the same instruction is one access of the hardware.
//
// Shared memory has 32 banks of 4 bytes. A warp's access of up to 4 bytes a lane is served at once, of 8 in two halves,
// of 16 in four quarters; each part takes as many cycles as the busiest bank has different words in it, at least one.
#pragma once

#include <map>
#include <utility>

#include "state.h"

namespace emulate {

inline void log_shared(Fiber& fiber, size_t offset, size_t bytes, bool write, uintptr_t pc) {
  fiber.log.push_back(Logged{pc, uint32_t(offset), uint8_t(std::min<size_t>(bytes, 255)), write});
}

// Cycles for one part: `count` lanes that access `bytes` each at `offsets`.
inline int wavefronts(const uint32_t* offsets, int count, int bytes) {
  uint32_t words[LANES][LANES];
  int used[LANES] = {}, most = 0;
  for (int i = 0; i < count; i++) {
    for (uint32_t word = offsets[i] / 4; word <= (offsets[i] + bytes - 1) / 4; word++) {
      const int bank = word % LANES;
      int k = 0;
      while (k < used[bank] && words[bank][k] != word) k++;
      if (k == used[bank]) {
        words[bank][k] = word;
        most = std::max(most, ++used[bank]);
      }
    }
  }
  return most;
}

// One access of a warp: `offsets` of the lanes that take part, in the order of lanes.
inline void count_access(const uint32_t* offsets, const int* lanes, int count, int bytes) {
  const int part = bytes <= 4 ? LANES : bytes <= 8 ? LANES / 2 : LANES / 4;
  for (int i = 0; i < count;) {
    int end = i;
    while (end < count && lanes[end] / part == lanes[i] / part) end++;
    const int cycles = wavefronts(offsets + i, end - i, bytes);
    state.report.shared_wavefronts += cycles, state.report.bank_conflicts += cycles - 1;
    i = end;
  }
}

// Counts and forgets what the warp's lanes have logged; called where they meet.
inline void flush_log(Fiber* warp) {
  const int lanes = warp->warp_lanes;
  // By instruction, and how often the lane had come there: lanes that took another path don't take part.
  std::map<std::pair<uintptr_t, uint32_t>, std::vector<std::pair<int, Logged>>> accesses;
  bool same = true;
  for (int lane = 1; same && lane < lanes; lane++) {
    same = warp[lane].log.size() == warp[0].log.size();
    for (size_t i = 0; same && i < warp[0].log.size(); i++) same = warp[lane].log[i].pc == warp[0].log[i].pc;
  }
  uint32_t offsets[LANES];
  int numbers[LANES];
  if (same) {
    for (size_t i = 0; i < warp[0].log.size(); i++) {
      for (int lane = 0; lane < lanes; lane++) offsets[lane] = warp[lane].log[i].offset, numbers[lane] = lane;
      count_access(offsets, numbers, lanes, warp[0].log[i].bytes);
    }
  } else {
    for (int lane = 0; lane < lanes; lane++) {
      std::map<uintptr_t, uint32_t> times;
      for (const Logged& access : warp[lane].log) {
        accesses[{access.pc, times[access.pc]++}].emplace_back(lane, access);
      }
    }
    for (const auto& [key, group] : accesses) {
      int count = 0;
      for (const auto& [lane, access] : group) offsets[count] = access.offset, numbers[count++] = lane;
      count_access(offsets, numbers, count, group[0].second.bytes);
    }
  }
  for (int lane = 0; lane < lanes; lane++) warp[lane].log.clear();
}

}  // namespace emulate
