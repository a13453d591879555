// TMA: box copies between global and shared memory that land some time after they were issued, in an order of the seed.
#pragma once

#include "hopper_barrier.h"
#include "memory.h"

namespace emulate {

inline int64_t row_bytes(const EncodedMap& map) { return int64_t(map.box[0]) * map.element_bytes; }

inline int64_t box_bytes(const EncodedMap& map) {
  int64_t bytes = map.element_bytes;
  for (uint32_t i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// The place of a byte under a swizzle of so many bytes: 16-byte pieces are permuted within each 8 * swizzle bytes.
inline size_t swizzled(size_t address, int swizzle) {
  const size_t mask = swizzle == 128 ? 0x70 : swizzle == 64 ? 0x30 : swizzle == 32 ? 0x10 : 0;
  return address ^ (address >> 3 & mask);
}

// Calls row(offset in the box, global address or null, first byte, bytes) for every row of the box at `at`: the bytes
// from `first` on lie inside the tensor, all others of the row outside.
template <class F>
void for_each_row(const EncodedMap& map, const int* at, F row) {
  const int64_t rows = box_bytes(map) / row_bytes(map);
  const int64_t first = std::max<int64_t>(0, -int64_t(at[0]));
  const int64_t last = std::min<int64_t>(map.box[0], int64_t(map.shape[0]) - at[0]);
  for (int64_t number = 0; number < rows; number++) {
    bool inside = first < last;
    int64_t rest = number, address = (at[0] + first) * map.element_bytes;
    for (uint32_t dim = 1; dim < map.rank; dim++) {
      const int64_t index = at[dim] + rest % map.box[dim];
      rest /= map.box[dim];
      inside &= index >= 0 && index < map.shape[dim];
      address += index * int64_t(map.strides_bytes[dim - 1]);
    }
    row(number * row_bytes(map), inside ? map.base + address : nullptr, first * map.element_bytes,
        inside ? (last - first) * map.element_bytes : 0);
  }
}

// Byte of shared memory of this block, after checks of place and size; -1 once the launch has failed.
inline int64_t shared_place(const char* what, const void* shared, int64_t bytes, int alignment, uintptr_t pc) {
  const int64_t offset = static_cast<const unsigned char*>(shared) - state.current->block->shared;
  if (offset < 0 || offset + bytes > state.launch->shared_bytes) {
    fail("%s @%lx of %ld bytes at byte %ld of shared memory, which has %u", what, (unsigned long)module_offset(pc),
         long(bytes), long(offset), state.launch->shared_bytes);
    return -1;
  }
  if (offset % alignment) {
    fail("%s @%lx at byte %ld of shared memory: it must be a multiple of %d", what, (unsigned long)module_offset(pc),
         long(offset), alignment);
    return -1;
  }
  return offset;
}

inline bool check_map(const char* what, const EncodedMap& map, int dims, uintptr_t pc) {
  if (int(map.rank) != dims) {
    fail("%s @%lx with %d coordinates by a map of %d dims", what, (unsigned long)module_offset(pc), dims,
         int(map.rank));
    return false;
  }
  if (reinterpret_cast<uintptr_t>(map.base) % 16) {
    fail("%s @%lx by the map of a tensor whose address is no multiple of 16", what, (unsigned long)module_offset(pc));
    return false;
  }
  if (map.swizzle && row_bytes(map) != int64_t(map.swizzle)) {
    fail("%s @%lx: rows of the box have %ld bytes, and the swizzle %d: the emulator knows equal ones only", what,
         (unsigned long)module_offset(pc), long(row_bytes(map)), int(map.swizzle));
    return false;
  }
  return true;
}

inline int tile_alignment(const EncodedMap& map) { return map.swizzle ? 8 * int(map.swizzle) : 128; }

// Lets `write` fill the bytes later, and tells the mbarrier.
template <class F>
void post_load(const char* what, void* barrier_address, int64_t offset, int64_t bytes, uintptr_t pc, F write) {
  Fiber& me = *state.current;
  Mbarrier* barrier = find_barrier(what, barrier_address, pc);
  if (!barrier) return;
  if (!barrier->fenced && me.agent.base->at[flush_agent(barrier->initialiser)] < barrier->init.time) {
    return fail("%s @%lx: its mbarrier was initialised without fence_mbarrier_init() behind", what,
                (unsigned long)module_offset(pc));
  }
  barrier->loaded = barrier->phase + 1;
  const SharedClock known = knowledge(me.agent);
  Block* block = me.block;
  begin_async_write(what, *block, *known, offset, bytes, pc);
  const size_t at = static_cast<unsigned char*>(barrier_address) - block->shared;
  post_event([=] {
    Mbarrier& landed = hopper_block(*block).barriers[at];
    const int agent = barrier_agent(*block, landed.slot);
    const uint32_t time = ++hopper.times[agent];
    write(block->shared);
    shadow_land(*block, agent, time, offset, bytes, pc);
    complete_bytes(*block, landed, at, bytes, *known);
  });
}

inline void tma_load(void* shared, const EncodedMap& map, void* barrier, int dims, const int* coordinates,
                     uintptr_t pc) {
  const char* what = "tma_load";
  if (!check_map(what, map, dims, pc)) return;
  const int64_t bytes = box_bytes(map), offset = shared_place(what, shared, bytes, tile_alignment(map), pc);
  if (offset < 0) return;
  std::vector<int> at(coordinates, coordinates + dims);
  for_each_row(map, at.data(), [&](int64_t, unsigned char* from, int64_t, int64_t count) {
    if (from) global_access(from, count, false, pc);
  });
  post_load(what, barrier, offset, bytes, pc, [map, at, offset](unsigned char* memory) {
    for_each_row(map, at.data(), [&](int64_t row, unsigned char* from, int64_t first, int64_t count) {
      for (int64_t i = 0; i < row_bytes(map); i++) {
        const bool inside = from && i >= first && i < first + count;
        memory[swizzled(offset + row + i, map.swizzle)] = inside ? from[i - first] : 0;
      }
    });
  });
}

inline void bulk_load(void* shared, const void* global, void* barrier, int bytes, uintptr_t pc) {
  const char* what = "bulk_load";
  const int64_t offset = shared_place(what, shared, bytes, 16, pc);
  if (offset < 0) return;
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    return fail("bulk_load @%lx of %d bytes from %p: both are multiples of 16", (unsigned long)module_offset(pc), bytes,
                global);
  }
  global_access(global, bytes, false, pc);
  post_load(what, barrier, offset, bytes, pc, [=](unsigned char* memory) { memcpy(memory + offset, global, bytes); });
}

// ---- stores: each first reads shared memory, then writes global memory

inline void tma_store(const EncodedMap& map, const void* shared, int dims, const int* coordinates, uintptr_t pc) {
  const char* what = "tma_store";
  if (!check_map(what, map, dims, pc)) return;
  const int64_t bytes = box_bytes(map), offset = shared_place(what, shared, bytes, tile_alignment(map), pc);
  if (offset < 0) return;
  std::vector<int> at(coordinates, coordinates + dims);
  for_each_row(map, at.data(), [&](int64_t, unsigned char* to, int64_t, int64_t count) {
    if (to) global_access(to, count, true, pc);
  });
  Fiber& me = *state.current;
  Block* block = me.block;
  const SharedClock known = knowledge(me.agent);
  if (!check_async_read(what, *block, *known, offset, bytes, pc)) return;
  HopperThread& thread = hopper_thread(me);
  const int agent = store_agent(me.agent.index);
  hopper.times[agent] = ++thread.stores;
  begin_async_read(*block, *known, agent, thread.stores, offset, bytes, pc);
  if (!thread.open) thread.open = std::make_shared<StoreGroup>();
  const std::shared_ptr<StoreGroup> group = thread.open;
  group->time = thread.stores, group->reading++, group->writing++;
  post_event([=] {
    auto box = std::make_shared<std::vector<unsigned char>>(bytes);
    for (int64_t i = 0; i < bytes; i++) (*box)[i] = block->shared[swizzled(offset + i, map.swizzle)];
    end_async_read(*block, offset, bytes);
    group->reading--;
    post_event([=] {
      for_each_row(map, at.data(), [&](int64_t row, unsigned char* to, int64_t first, int64_t count) {
        if (to) memcpy(to, box->data() + row + first, count);
      });
      group->writing--;
    });
  });
}

inline void commit_stores() {
  HopperThread& thread = hopper_thread(*state.current);
  if (!thread.open) thread.open = std::make_shared<StoreGroup>();
  thread.groups.push_back(thread.open);
  thread.open = nullptr;
}

struct StoreWait {
  const HopperThread* thread;
  size_t groups;
  bool only_reads;
};

inline bool stores_done(void* argument) {
  const StoreWait& wait = *static_cast<StoreWait*>(argument);
  const auto& groups = wait.thread->groups;
  for (size_t i = 0; i + wait.groups < groups.size(); i++) {
    if (wait.only_reads ? groups[i]->reading : groups[i]->writing) return false;
  }
  return true;
}

inline void wait_stores(int groups, bool only_reads, uintptr_t pc) {
  Fiber& me = *state.current;
  HopperThread& thread = hopper_thread(me);
  StoreWait wait{&thread, size_t(groups), only_reads};
  wait_until(only_reads ? "tma_store_wait_read" : "tma_store_wait", pc, stores_done, &wait);
  for (size_t i = 0; i + groups < thread.groups.size(); i++) {
    if (thread.groups[i]->time) learn(me.agent, store_agent(me.agent.index), thread.groups[i]->time);
  }
  while (thread.groups.size() > size_t(groups) && !thread.groups.front()->writing) thread.groups.pop_front();
}

// A thread that ends must have waited: with its block, the shared memory goes that a store still reads.
inline void check_stores_waited(const Fiber& fiber) {
  const HopperThread& thread = hopper_thread(fiber);
  bool reading = thread.open && thread.open->reading;
  for (const auto& group : thread.groups) reading |= group->reading > 0;
  if (thread.open) {
    fail("leaves the kernel with TMA stores that it has not committed: tma_store_commit, then tma_store_wait_read<0>");
  } else if (reading) {
    fail("leaves the kernel while TMA stores still read shared memory: tma_store_wait_read<0> first");
  }
}

}  // namespace emulate

extern "C" {
void emulate_tma_load(void* shared, const void* map, void* barrier, int dims, const int* coordinates) {
  emulate::tma_load(shared, *static_cast<const emulate::EncodedMap*>(map), barrier, dims, coordinates, EMULATE_PC);
}

void emulate_bulk_load(void* shared, const void* global, void* barrier, int bytes) {
  emulate::bulk_load(shared, global, barrier, bytes, EMULATE_PC);
}

void emulate_tma_store(const void* map, const void* shared, int dims, const int* coordinates) {
  emulate::tma_store(*static_cast<const emulate::EncodedMap*>(map), shared, dims, coordinates, EMULATE_PC);
}

void emulate_tma_store_commit() { emulate::commit_stores(); }

void emulate_tma_store_wait(int groups, bool only_reads) { emulate::wait_stores(groups, only_reads, EMULATE_PC); }
}
