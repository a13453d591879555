// Memory that a kernel works in while it runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace megalite {

// From a page on, not initialised. Large ones come from where `work_in` (api.h) says, else from malloc.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes);
  Scratch(Scratch&& other) noexcept { swap(other); }
  Scratch& operator=(Scratch&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Scratch();

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kPage - 1) / kPage * kPage);
  }

 private:
  void swap(Scratch& other) {
    std::swap(memory_, other.memory_);
    std::swap(give_, other.give_);
  }

  static constexpr size_t kPage = 4096;
  void* memory_ = nullptr;
  int (*give_)(void*) = nullptr;  // null: malloc's
};

}  // namespace megalite
