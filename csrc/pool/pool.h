// Blocks of one reserved stretch of addresses: best fit, neighbours that are free are one. No torch in here.
//
// glibc serves a tensor's aligned memory from its heap and splits off what is in front of it; those splinters go to a
// thread's cache, which keeps them, and with every small survivor between two tensors they cut the heap into holes:
// 100-150 MB of a llama-60m step. Here a block is all there is between its neighbours, what is known of it lies
// elsewhere, and memory that was never written is taken last.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace megalite {

class Pool {
 public:
  // A multiple of what vectors, matrix tiles and cache lines want.
  static constexpr size_t kAlignment = 64;
  // Between blocks, so that tensors whose sizes are powers of two do not all begin at the same place modulo 4096,
  // where a load waits for a store that it has nothing to do with. 5 lines: 64 blocks before a place comes again.
  static constexpr size_t kGap = 5 * kAlignment;
  static constexpr size_t kHugePage = size_t{2} << 20;

  // Reserves `size` bytes of addresses; memory comes when they are written, in huge pages where the kernel has them.
  explicit Pool(size_t size) {
    const size_t mapped = size + kHugePage;
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kHugePage - 1) / kHugePage * kHugePage;
    first_ = first;
    end_ = first + size;
    tail_ = written_ = first_;
    madvise(reinterpret_cast<void*>(first_), size, MADV_HUGEPAGE);
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool mapped() const { return end_ != 0; }

  // Whether the address is one of this pool's, in use or not.
  bool owns(const void* pointer) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return address >= first_ && address < end_;
  }

  // `size` bytes, or nullptr where no stretch is long enough.
  void* take(size_t size) {
    if (size > end_ - first_) return nullptr;
    const size_t wanted = (size + kAlignment - 1) / kAlignment * kAlignment + kGap;
    std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t block;
    const auto fit = by_size_.lower_bound({wanted, 0});
    if (fit != by_size_.end()) {
      const auto [length, start] = *fit;
      block = start;
      erase_free(start, length);
      if (length > wanted) insert_free(start + wanted, length - wanted);
    } else {
      if (wanted > end_ - tail_) return nullptr;
      block = tail_;
      tail_ += wanted;
      if (tail_ > written_) written_ = tail_;
    }
    used_.emplace(block, wanted);
    used_bytes_ += wanted;
    if (used_bytes_ > peak_bytes_) peak_bytes_ = used_bytes_;
    return reinterpret_cast<void*>(block);
  }

  // Takes a block back; false for an address that is none.
  bool give(void* pointer) {
    auto start = reinterpret_cast<uintptr_t>(pointer);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(start);
    if (found == used_.end()) return false;
    size_t length = found->second;
    used_bytes_ -= length;
    used_.erase(found);
    const auto after = by_address_.find(start + length);
    if (after != by_address_.end()) {
      const size_t more = after->second;
      erase_free(start + length, more);
      length += more;
    }
    auto before = by_address_.lower_bound(start);
    if (before != by_address_.begin()) {
      --before;
      const auto [address, bytes] = *before;
      if (address + bytes == start) {
        erase_free(address, bytes);
        start = address;
        length += bytes;
      }
    }
    if (start + length == tail_) {
      tail_ = start;
    } else {
      insert_free(start, length);
    }
    return true;
  }

  // The kernel gets every whole huge page back that no block lies in; the next block there finds zeros. A part of a
  // huge page would come back in small ones.
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, length] : by_address_) drop(start, start + length);
    drop(tail_, written_ + kHugePage - 1);
    written_ = tail_;
  }

  struct Stats {
    size_t used, peak, written, blocks, holes;
  };

  Stats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {used_bytes_, peak_bytes_, written_ - first_, used_.size(), by_address_.size()};
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_bytes_ = used_bytes_;
  }

  // Around a fork: the child must not get a lock that a thread holds which it has not.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void insert_free(uintptr_t start, size_t length) {
    by_address_.emplace(start, length);
    by_size_.emplace(length, start);
  }

  void erase_free(uintptr_t start, size_t length) {
    by_address_.erase(start);
    by_size_.erase({length, start});
  }

  static void drop(uintptr_t start, uintptr_t end) {
    const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = end / kHugePage * kHugePage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }

  uintptr_t first_ = 0, end_ = 0;
  uintptr_t tail_ = 0;     // from here on nothing is in use
  uintptr_t written_ = 0;  // from here on nothing was, since the last release
  std::mutex mutex_;
  std::map<uintptr_t, size_t> by_address_;          // free stretches before the tail
  std::set<std::pair<size_t, uintptr_t>> by_size_;  // the same, smallest first; of equal ones the lowest
  std::unordered_map<uintptr_t, size_t> used_;
  size_t used_bytes_ = 0, peak_bytes_ = 0;
};

}  // namespace megalite
