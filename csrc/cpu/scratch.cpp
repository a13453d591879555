// Where kernels get the memory that they work in.
#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "api.h"

namespace megalite {

namespace {

constexpr size_t kLeastBytes = 64 << 10;

// `take` is set last and read first: whoever finds it finds the other. A pool is never taken away.
std::atomic<void* (*)(size_t)> take{nullptr};
std::atomic<int (*)(void*)> give{nullptr};

}  // namespace

void work_in(Memory from) {
  give.store(from.give);
  take.store(from.take);
}

Scratch::Scratch(size_t bytes) {
  const auto from = take.load();
  if (from != nullptr && bytes >= kLeastBytes) {
    memory_ = from(bytes + kPage);
    if (memory_ != nullptr) give_ = give.load();
  }
  if (memory_ == nullptr) memory_ = std::malloc(bytes + kPage);
  if (memory_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  if (give_ != nullptr) {
    give_(memory_);
  } else {
    std::free(memory_);
  }
}

}  // namespace megalite
