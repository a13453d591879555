// wgmma: the four warps of a group issue products, which read shared memory through descriptors and write accumulators
// at any time from then on. Here that is when a warp waits for them: until then operands must stay, and accumulators
// are out of reach.
#pragma once

#include "collectives.h"
#include "hopper_tma.h"
#include "matrix.h"

namespace emulate {

constexpr int WGMMA_M = 64, WGMMA_K = 16;

// An operand in shared memory, by the bits of its descriptor: see ptx_hopper.cuh.
struct Operand {
  size_t start, leading, stride;
  int swizzle;
  bool transposed;

  Operand(uint64_t bits, bool transposed_)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        transposed(transposed_) {
    static const int SWIZZLES[] = {0, 128, 64, 32};
    swizzle = SWIZZLES[bits >> 62];
  }

  // Byte of the 8 elements (16 bytes) number `chunk` of line `line`: K-major, line is a row (of M or N) and chunks go
  // along K; transposed, line is a row of K and chunks go along M or N.
  size_t piece(int line, int chunk) const {
    const size_t pitch = swizzle ? swizzle : 16;
    size_t at = start + line % 8 * pitch;
    if (!transposed) {
      at += line / 8 * stride + chunk * (swizzle ? 16 : leading);
    } else if (swizzle) {
      const int wide = swizzle / 16;
      at += chunk % wide * 16 + chunk / wide * leading + line / 8 * stride;
    } else {
      at += chunk * stride + line / 8 * leading;
    }
    return swizzled(at, swizzle);
  }

  // Of an operand of `size` rows of M or N.
  int lines(int size) const { return transposed ? WGMMA_K : size; }
  int chunks(int size) const { return (transposed ? size : WGMMA_K) / 8; }
};

inline bool check_operand(const char* what, const Operand& operand, uint64_t bits, int size, uintptr_t pc) {
  if (bits >> 49 & 7 || bits & (1ull << 14 | 1ull << 15)) {
    fail("wgmma @%lx: its descriptor %016lx of %s has bits set that must be 0", (unsigned long)module_offset(pc),
         (unsigned long)bits, what);
    return false;
  }
  const size_t phase = operand.swizzle ? operand.start % (8 * operand.swizzle) : 0;
  if (phase >= size_t(operand.swizzle) && operand.swizzle) {
    fail(
        "wgmma @%lx: %s starts at byte %zu of shared memory, within a swizzle's pattern: rows start at multiples of %d",
        (unsigned long)module_offset(pc), what, operand.start, 8 * operand.swizzle);
    return false;
  }
  for (int line = 0; line < operand.lines(size); line++) {
    for (int chunk = 0; chunk < operand.chunks(size); chunk++) {
      if (operand.piece(line, chunk) + 16 > state.launch->shared_bytes) {
        fail("wgmma @%lx: %s reaches byte %zu of shared memory, which has %u", (unsigned long)module_offset(pc), what,
             operand.piece(line, chunk) + 15, state.launch->shared_bytes);
        return false;
      }
    }
  }
  return true;
}

// Calls piece(offset) for all 16-byte pieces of the operand that hold M or N rows [from, to) of `size`.
template <class F>
void for_each_piece(const Operand& operand, int size, int from, int to, F piece) {
  for (int line = 0; line < operand.lines(size); line++) {
    for (int chunk = 0; chunk < operand.chunks(size); chunk++) {
      const int row = operand.transposed ? chunk * 8 : line;
      if (row >= from && row < to) piece(operand.piece(line, chunk));
    }
  }
}

// ---- issue

struct Issue {
  char type;
  int n;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate, transpose_a, transpose_b;
  uintptr_t pc;
};

inline WarpGroup& warp_group(const Fiber* warp) {
  return hopper_block(*warp->block).groups[warp->thread / GROUP_THREADS];
}
inline int warp_number(const Fiber* warp) { return warp->thread / LANES % GROUP_WARPS; }
inline uint32_t product_time(const WarpGroup& group, uint32_t number) { return group.earlier + number + 1; }

inline bool check_group(const Fiber* warp, const char* what) {
  if (state.threads() - warp->thread / GROUP_THREADS * GROUP_THREADS < GROUP_THREADS || warp->warp_lanes < LANES) {
    fail("%s needs whole warp groups of %d threads; the block has %d", what, GROUP_THREADS, state.threads());
    return false;
  }
  return true;
}

// The lane's accumulator is the instruction's from now on.
inline bool take_accumulator(Fiber& lane, const Issue& issue, uint32_t number) {
  HopperThread& thread = hopper_thread(lane);
  const unsigned char* begin = reinterpret_cast<const unsigned char*>(issue.d);
  const size_t bytes = issue.n / 2 * sizeof(float);
  if (!thread.fenced) {
    fail("lane %d: wgmma @%lx without a wgmma_fence before it", lane.lane, (unsigned long)module_offset(issue.pc));
    return false;
  }
  std::vector<Accumulator>& all = thread.accumulators;
  for (size_t i = 0; i < all.size();) {
    Accumulator& one = all[i];
    if (one.begin == begin && one.bytes == bytes) {
      if (one.touched) {
        fail("lane %d: wgmma @%lx into registers that were accessed after the last wgmma_fence", lane.lane,
             (unsigned long)module_offset(issue.pc));
        return false;
      }
      one.pending = true, one.product = number;
      return true;
    }
    const bool overlaps = begin < one.begin + one.bytes && one.begin < begin + bytes;
    if (overlaps && one.pending) {
      fail("lane %d: wgmma @%lx into a part of the accumulator of one that is under way", lane.lane,
           (unsigned long)module_offset(issue.pc));
      return false;
    }
    if (overlaps) {
      all.erase(all.begin() + i);
    } else {
      i++;
    }
  }
  all.push_back(Accumulator{begin, bytes, number, true, false});
  lane.accumulators = true;
  return true;
}

// What each warp knows must cover the rows of A that are its own, and all of B.
inline bool check_reads(Block& block, const Product& product) {
  bool good = true;
  for (int i = 0; i < GROUP_WARPS && !product.registers; i++) {
    for_each_piece(Operand(product.a, product.transpose_a), WGMMA_M, i * 16, i * 16 + 16, [&](size_t offset) {
      good = good && check_async_read("wgmma (A)", block, *product.known[i], offset, 16, product.pc);
    });
  }
  Clock* least = clocks.make();  // what all four know
  for (size_t i = 0; i < least->at.size(); i++) {
    least->at[i] =
        std::min({product.known[0]->at[i], product.known[1]->at[i], product.known[2]->at[i], product.known[3]->at[i]});
  }
  const SharedClock known = hold(least);
  for_each_piece(Operand(product.b, product.transpose_b), product.n, 0, product.n, [&](size_t offset) {
    good = good && check_async_read("wgmma (B)", block, *known, offset, 16, product.pc);
  });
  return good;
}

template <class F>
void for_each_read(const Product& product, F piece) {
  if (!product.registers) for_each_piece(Operand(product.a, product.transpose_a), WGMMA_M, 0, WGMMA_M, piece);
  for_each_piece(Operand(product.b, product.transpose_b), product.n, 0, product.n, piece);
}

// All four warps have come: the operands are being read.
inline void begin_product(Fiber* warp, WarpGroup& group, Product& product, uint32_t number) {
  const int agent = group_agent(*warp->block, warp->thread / GROUP_THREADS);
  const uint32_t time = product_time(group, number);
  hopper.times[agent] = std::max(hopper.times[agent], time);
  Clock* all = clocks.make();
  for (const SharedClock& one : product.known) merge(all, one.get());
  const SharedClock known = hold(all);
  if (!check_reads(*warp->block, product)) return;
  for_each_read(product,
                [&](size_t offset) { begin_async_read(*warp->block, *known, agent, time, offset, 16, product.pc); });
  for (SharedClock& one : product.known) one = nullptr;
}

inline bool same_product(const Product& product, const Issue& issue) {
  return product.type == issue.type && product.n == issue.n && product.a == issue.a && product.b == issue.b &&
         product.registers == (issue.a_registers != nullptr) && product.accumulate == issue.accumulate &&
         product.transpose_a == issue.transpose_a && product.transpose_b == issue.transpose_b;
}

inline void act_wgmma(Fiber* warp, uint32_t) {
  if (!check_group(warp, "wgmma")) return;
  WarpGroup& group = warp_group(warp);
  const int number = warp_number(warp);
  const uint32_t sequence = group.issued[number]++;
  const Issue& first = payload_of<Issue>(warp, 0);
  if (sequence - group.done == group.products.size()) {
    Product fresh;
    fresh.type = first.type, fresh.n = first.n, fresh.a = first.a, fresh.b = first.b, fresh.pc = first.pc;
    fresh.registers = first.a_registers != nullptr, fresh.accumulate = first.accumulate;
    fresh.transpose_a = first.transpose_a, fresh.transpose_b = first.transpose_b;
    if (!fresh.registers && !check_operand("A", Operand(fresh.a, fresh.transpose_a), fresh.a, WGMMA_M, fresh.pc))
      return;
    if (!check_operand("B", Operand(fresh.b, fresh.transpose_b), fresh.b, fresh.n, fresh.pc)) return;
    group.products.push_back(fresh);
  }
  Product& product = group.products[sequence - group.done];
  Release release;
  for (int lane = 0; lane < LANES; lane++) {
    const Issue& issue = payload_of<Issue>(warp, lane);
    if (!same_product(product, issue)) {
      return fail("wgmma @%lx: thread %d of the warp group brings other descriptors or options than the rest",
                  (unsigned long)module_offset(issue.pc), number * LANES + lane);
    }
    if (!take_accumulator(warp[lane], issue, sequence)) return;
    product.d[number * LANES + lane] = issue.d;
    if (issue.a_registers) memcpy(product.a_registers[number * LANES + lane], issue.a_registers, 16);
    release.arrive(warp[lane].agent);
  }
  product.known[number] = hold(release.seal());
  if (++product.warps == GROUP_WARPS) begin_product(warp, group, product, sequence);
}

// ---- arithmetic

// Elements [rows, 16] of an operand in shared memory.
inline void read_operand(const Block& block, const Operand& operand, char type, int rows, float* out) {
  for (int line = 0; line < operand.lines(rows); line++) {
    for (int chunk = 0; chunk < operand.chunks(rows); chunk++) {
      uint32_t pairs[4];
      memcpy(pairs, block.shared + operand.piece(line, chunk), 16);
      for (int i = 0; i < 8; i++) {
        const int row = operand.transposed ? chunk * 8 + i : line, k = operand.transposed ? line : chunk * 8 + i;
        out[row * WGMMA_K + k] = element(type, pairs[i / 2], i % 2);
      }
    }
  }
}

inline void read_registers(const Product& product, float* out) {
  for (int thread = 0; thread < GROUP_THREADS; thread++) {
    for (int r = 0; r < 4; r++) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, k = r / 2 * 8 + thread % 4 * 2;
      for (int i = 0; i < 2; i++) out[row * WGMMA_K + k + i] = element(product.type, product.a_registers[thread][r], i);
    }
  }
}

__attribute__((optimize("O3"))) inline void compute(const Block& block, const Product& product) {
  static float a[WGMMA_M * WGMMA_K], b[256 * WGMMA_K], across[WGMMA_K][256];
  if (product.registers) {
    read_registers(product, a);
  } else {
    read_operand(block, Operand(product.a, product.transpose_a), product.type, WGMMA_M, a);
  }
  read_operand(block, Operand(product.b, product.transpose_b), product.type, product.n, b);
  for (int column = 0; column < product.n; column++) {
    for (int k = 0; k < WGMMA_K; k++) across[k][column] = b[column * WGMMA_K + k];
  }
  for (int row = 0; row < WGMMA_M; row++) {
    float sums[256] = {};
    for (int k = 0; k < WGMMA_K; k++) {
      const float factor = a[row * WGMMA_K + k];
      for (int column = 0; column < product.n; column++) sums[column] += factor * across[k][column];
    }
    for (int column = 0; column < product.n; column++) {
      // The thread and the register of this element.
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int i = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      float& d = product.d[thread][i];
      d = product.accumulate ? d + sums[column] : sums[column];
    }
  }
}

// ---- commit and wait

struct ProductWait {
  const WarpGroup* group;
  uint32_t products;  // that must be complete
};

inline bool products_issued(void* argument) {
  const ProductWait& wait = *static_cast<ProductWait*>(argument);
  for (uint32_t i = wait.group->done; i < wait.products; i++) {
    if (wait.group->products[i - wait.group->done].warps < GROUP_WARPS) return false;
  }
  return true;
}

inline void act_wgmma_commit(Fiber* warp, uint32_t) {
  if (!check_group(warp, "wgmma_commit")) return;
  WarpGroup& group = warp_group(warp);
  group.commits[warp_number(warp)].push_back(group.issued[warp_number(warp)]);
}

struct Finish {
  int groups;
  uint32_t products;
};

// How many products must be complete when at most `groups` commits may be pending; the rest is forgotten.
inline void act_wgmma_target(Fiber* warp, uint32_t) {
  if (!check_group(warp, "wgmma_wait")) return;
  WarpGroup& group = warp_group(warp);
  const int number = warp_number(warp);
  std::deque<uint32_t>& commits = group.commits[number];
  while (int(commits.size()) > payload_of<Finish>(warp, 0).groups) {
    group.waited[number] = commits.front();
    commits.pop_front();
  }
  for (int lane = 0; lane < LANES; lane++) payload_of<Finish>(warp, lane).products = group.waited[number];
}

inline void act_wgmma_finish(Fiber* warp, uint32_t) {
  WarpGroup& group = warp_group(warp);
  const uint32_t products = payload_of<Finish>(warp, 0).products;
  while (group.done < products) {
    const Product& product = group.products.front();
    compute(*warp->block, product);
    for_each_read(product, [&](size_t offset) { end_async_read(*warp->block, offset, 16); });
    group.products.pop_front();
    group.done++;
  }
  if (products == 0) return;
  const int agent = group_agent(*warp->block, warp->thread / GROUP_THREADS);
  const Clock* before = nullptr;  // lanes mostly share their clock, before and after
  Clock* after = nullptr;
  for (int lane = 0; lane < LANES; lane++) {
    Fiber& fiber = warp[lane];
    for (Accumulator& one : hopper_thread(fiber).accumulators) one.pending &= one.product >= products;
    if (fiber.agent.base == before) {
      clocks.drop(fiber.agent.base);
      fiber.agent.base = clocks.share(after);
    } else {
      before = fiber.agent.base;
      learn(fiber.agent, agent, product_time(group, products - 1));
      after = fiber.agent.base;
    }
  }
}

inline void act_wgmma_fence(Fiber* warp, uint32_t) {
  for (int lane = 0; lane < LANES; lane++) {
    HopperThread& thread = hopper_thread(warp[lane]);
    thread.fenced = true;
    for (Accumulator& one : thread.accumulators) one.touched = false;
  }
}

inline void act_register_limit(Fiber* warp, uint32_t) {
  HopperBlock& block = hopper_block(*warp->block);
  block.limits[warp->thread / LANES] = payload_of<Finish>(warp, 0).groups;
  int64_t total = 0;
  for (const int limit : block.limits) {
    if (limit == 0) return;
    total += limit * LANES;
  }
  if (total > 65536) fail("setmaxnreg gives the block's warps %ld registers in all; there are 65536", long(total));
}

// An access to local variables of a thread that has accumulators.
inline void check_registers(const Fiber& fiber, const unsigned char* begin, size_t bytes, uintptr_t pc) {
  for (Accumulator& one : hopper_thread(fiber).accumulators) {
    if (begin >= one.begin + one.bytes || one.begin >= begin + bytes) continue;
    if (one.pending) {
      return fail(
          "touches element %ld of an accumulator @%lx that a wgmma under way writes: wgmma_commit and wgmma_wait "
          "first",
          long(begin - one.begin) / 4, (unsigned long)module_offset(pc));
    }
    one.touched = true;
  }
}

inline void check_products_waited(const Fiber& fiber) {
  for (const Accumulator& one : hopper_thread(fiber).accumulators) {
    if (one.pending) return fail("leaves the kernel with a wgmma that it has not waited for");
  }
}

}  // namespace emulate

extern "C" {
void emulate_wgmma_fence() { emulate::collective("wgmma_fence", ~0u, nullptr, emulate::act_wgmma_fence, EMULATE_PC); }

void emulate_wgmma_commit() {
  emulate::collective("wgmma_commit", ~0u, nullptr, emulate::act_wgmma_commit, EMULATE_PC);
}

void emulate_wgmma_wait(int groups) {
  using namespace emulate;
  const uintptr_t pc = EMULATE_PC;
  Finish finish{groups, 0};
  collective("wgmma_wait", ~0u, &finish, act_wgmma_target, pc);
  ProductWait wait{&warp_group(state.current->warp), finish.products};
  wait_until("wgmma_wait (another warp of the group has not issued the product)", pc, products_issued, &wait);
  collective("wgmma_wait", ~0u, &finish, act_wgmma_finish, pc);
}

uint32_t emulate_wgmma_start(const void* shared, int leading_bytes, int stride_bytes) {
  using namespace emulate;
  const int64_t start = static_cast<const unsigned char*>(shared) - state.current->block->shared;
  if ((start | leading_bytes | stride_bytes) & 15 || start < 0 || start >= 1 << 18) {
    fail("wgmma_descriptor @%lx of byte %ld of shared memory, offsets %d and %d: all are multiples of 16 below 2^18",
         (unsigned long)module_offset(EMULATE_PC), long(start), leading_bytes, stride_bytes);
  }
  return uint32_t(start);
}

void emulate_wgmma(char type, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate,
                   bool transpose_a, bool transpose_b) {
  emulate::Issue issue{type, n, d, a_registers, a, b, accumulate, transpose_a, transpose_b, EMULATE_PC};
  emulate::collective("wgmma", ~0u, &issue, emulate::act_wgmma, issue.pc);
}

void emulate_register_limit(int registers, bool) {
  emulate::Finish limit{registers, 0};
  emulate::collective("setmaxnreg", ~0u, &limit, emulate::act_register_limit, EMULATE_PC);
}
}
