// Counts bank conflicts and sectors: what a warp's lanes access by the same instruction is one access of the hardware.
//
// Shared memory has 32 banks of 4 bytes. A warp's access of up to 4 bytes a lane is served at once, of 8 in two halves,
// of 16 in four quarters; each part takes as many cycles as the busiest bank has different words in it, at least one.
// Global memory moves in sectors of 32 bytes: an access of a warp moves all those that its lanes touch.
#pragma once

#include <map>
#include <utility>

#include "state.h"

namespace emulate {

constexpr uint64_t SECTOR_BYTES = 32;

inline void log_shared(Fiber& fiber, size_t offset, size_t bytes, uintptr_t pc) {
  fiber.log.push_back(Logged{pc, offset, uint8_t(std::min<size_t>(bytes, 255)), false});
}

inline void log_global(Fiber& fiber, const void* pointer, size_t bytes, uintptr_t pc) {
  const uint64_t place = reinterpret_cast<uintptr_t>(pointer);
  if (bytes <= 16) {
    fiber.log.push_back(Logged{pc, place, uint8_t(bytes), true});
  } else {  // a copy that one thread issues: no other lane shares its sectors
    state.report.global_sectors += (place + bytes - 1) / SECTOR_BYTES - place / SECTOR_BYTES + 1;
  }
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

inline void count_sectors(const uint64_t* places, int count, int bytes) {
  uint64_t sectors[2 * LANES];
  int n = 0;
  for (int i = 0; i < count; i++) {
    for (uint64_t sector = places[i] / SECTOR_BYTES; sector <= (places[i] + bytes - 1) / SECTOR_BYTES; sector++) {
      sectors[n++] = sector;
    }
  }
  std::sort(sectors, sectors + n);
  state.report.global_sectors += std::unique(sectors, sectors + n) - sectors;
}

// One access of a warp, by the lanes that take part in it.
inline void count_logged(const Logged* const* accesses, const int* lanes, int count) {
  uint64_t places[LANES];
  uint32_t offsets[LANES];
  for (int i = 0; i < count; i++) places[i] = accesses[i]->place, offsets[i] = uint32_t(places[i]);
  if (accesses[0]->global) {
    count_sectors(places, count, accesses[0]->bytes);
  } else {
    count_access(offsets, lanes, count, accesses[0]->bytes);
  }
}

// Counts and forgets what the warp's lanes have logged; called where they meet.
inline void flush_log(Fiber* warp) {
  const int lanes = warp->warp_lanes;
  bool same = true;
  for (int lane = 1; same && lane < lanes; lane++) {
    same = warp[lane].log.size() == warp[0].log.size();
    for (size_t i = 0; same && i < warp[0].log.size(); i++) same = warp[lane].log[i].pc == warp[0].log[i].pc;
  }
  const Logged* accesses[LANES];
  int numbers[LANES];
  if (same) {
    for (size_t i = 0; i < warp[0].log.size(); i++) {
      for (int lane = 0; lane < lanes; lane++) accesses[lane] = &warp[lane].log[i], numbers[lane] = lane;
      count_logged(accesses, numbers, lanes);
    }
  } else {
    // By instruction, memory (a copy has both) and how often the lane had come there: lanes that took another path
    // don't take part.
    using Place = std::pair<uintptr_t, bool>;
    std::map<std::pair<Place, uint32_t>, std::vector<std::pair<int, const Logged*>>> groups;
    for (int lane = 0; lane < lanes; lane++) {
      std::map<Place, uint32_t> times;
      for (const Logged& access : warp[lane].log) {
        const Place place{access.pc, access.global};
        groups[{place, times[place]++}].emplace_back(lane, &access);
      }
    }
    for (const auto& [key, group] : groups) {
      int count = 0;
      for (const auto& [lane, access] : group) accesses[count] = access, numbers[count++] = lane;
      count_logged(accesses, numbers, count);
    }
  }
  for (int lane = 0; lane < lanes; lane++) warp[lane].log.clear();
}

}  // namespace emulate
