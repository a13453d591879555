// torch's allocator for CPUs with large blocks from a pool; a library of its own, since it needs torch's headers.
//
// Only c10's Allocator is used. Nothing happens when the library is loaded; `megalite_pool_install` does it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <torch/headeronly/version.h>

#include <atomic>
#include <cstddef>

#include "pool.h"

#define MEGALITE_API extern "C" __attribute__((visibility("default")))

namespace {

using megalite::Pool;

Pool* pool = nullptr;  // never deleted: tensors die in any order at the end of a process
c10::Allocator* previous = nullptr;
size_t least_bytes = 0;

void give_back(void* pointer) {
  if (pointer == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(pointer);
  pool->give(pointer);
}

// For `raw_deallocate`, which has only the address.
void give_back_any(void* pointer) {
  if (pool->owns(pointer)) {
    give_back(pointer);
  } else {
    previous->raw_deallocate(pointer);
  }
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* pointer = size >= least_bytes ? pool->take(size) : nullptr;
    // Small, or no room: as before, with the error message of the allocator that was there.
    if (pointer == nullptr) return previous->allocate(size);
    c10::profiledCPUMemoryReporter().New(pointer, size);
    return {pointer, pointer, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back_any; }

  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }
};

}  // namespace

// The version of torch whose headers this was compiled with: a class of theirs is derived from.
MEGALITE_API const char* megalite_pool_torch_version() { return TORCH_VERSION; }

// From now on tensors of at least `least` bytes come from `size` bytes of addresses. True if they do.
MEGALITE_API int megalite_pool_install(size_t size, size_t least) {
  if (pool != nullptr) return c10::GetCPUAllocator() != previous;
  auto made = new Pool(size);
  if (!made->mapped()) {
    delete made;
    return 0;
  }
  pool = made;
  least_bytes = least;
  previous = c10::GetCPUAllocator();
  auto allocator = new PoolAllocator();
  c10::SetCPUAllocator(allocator);
  pthread_atfork([] { pool->lock(); }, [] { pool->unlock(); }, [] { pool->unlock(); });
  return c10::GetCPUAllocator() == allocator;
}

// Memory for others than torch: null where there is no room, and 0 for what is not the pool's.
MEGALITE_API void* megalite_pool_take(size_t size) { return pool != nullptr ? pool->take(size) : nullptr; }
MEGALITE_API int megalite_pool_give(void* pointer) { return pool != nullptr && pool->give(pointer); }

MEGALITE_API int megalite_pool_owns(const void* pointer) { return pool != nullptr && pool->owns(pointer); }

MEGALITE_API void megalite_pool_release() {
  if (pool != nullptr) pool->release();
}

// Bytes in use, the most that were, bytes up to the highest address ever used; blocks in use and holes between them.
MEGALITE_API void megalite_pool_stats(size_t* values, int reset_peak) {
  const Pool::Stats now = pool != nullptr ? pool->stats() : Pool::Stats{};
  values[0] = now.used;
  values[1] = now.peak;
  values[2] = now.written;
  values[3] = now.blocks;
  values[4] = now.holes;
  if (pool != nullptr && reset_peak) pool->reset_peak();
}
