// Hopper's instructions (mbarrier, TMA, wgmma, clusters, stmatrix), one thin function each. The second half of
// ptx.cuh, which includes this file; no other file holds inline assembly. Under MEGALITE_EMULATE the same names come
// from csrc/emulate/ptx_hopper.h: emulation tests kernels, never the strings below. Those are tested by the compile
// gate (they assemble, and become the instructions that the design promises) and, where a GPU is at hand, by running.
//
// What an architecture lacks is not declared for it, so a kernel built for the wrong one fails in the compiler:
//   sm_90 and up   mbarrier, TMA, clusters, stmatrix
//   sm_90a only    wgmma and setmaxnreg by warp group (Blackwell's tensor cores are others)
//
// Order of a TMA load: mbarrier_init, fence_mbarrier_init, a block barrier; then one thread calls
// mbarrier_arrive_expect(bytes) and tma_load; readers mbarrier_wait(parity). A barrier begins in phase 0: wait(0) ends
// with the first completion, wait(1) on a fresh barrier returns at once (a producer that finds the buffer empty).
// Order of a product: wgmma_fence, wgmma..., wgmma_commit, wgmma_wait<0>, wgmma_pin; then the accumulators may be
// touched. Operands that threads wrote with ordinary stores need fence_async_shared() by the writers before the barrier
// that hands them over; what TMA wrote does not.
#pragma once

#include "descriptor.cuh"
#include "types.cuh"

namespace ptx {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// --- mbarrier -------------------------------------------------------------------------------------------------------

// Starts phase 0, which ends after `count` arrivals (and all expected bytes). By one thread; others may use the barrier
// after fence_mbarrier_init() of that thread and a block (or cluster) barrier.
DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, after adding `bytes` to what TMA must bring before the phase ends.
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns once the phase of that parity has ended. try_wait sleeps in hardware for a while; the loop is for its time
// limit.
DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes this thread's earlier ordinary stores to shared memory visible to TMA and wgmma (the async proxy).
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- TMA ------------------------------------------------------------------------------------------------------------

// Coordinates innermost first, in elements; reads out of bounds give zeros (and count as bytes), writes are dropped.
// Shared addresses are 128-byte aligned; a swizzle of S bytes repeats every 8 * S, so tiles start at multiples of that.

DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

DEVICE void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

DEVICE void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

DEVICE void tma_store_2d(const TensorMap* map, const void* shared, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1)
      : "memory");
}

DEVICE void tma_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

DEVICE void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(
                   shared_address(shared)),
               "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// `bytes` (a multiple of 16, both ends 16-byte aligned) from global to shared memory, without a map.
DEVICE void bulk_load(void* shared, const void* global, uint64_t* barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Groups the calling thread's stores since its last commit; waiting, too, is by the thread that stored.
DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most N groups still write global memory.
template <int N>
DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Until at most N groups still read shared memory: after it that memory may be reused.
template <int N>
DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// --- clusters -------------------------------------------------------------------------------------------------------

DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

DEVICE int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// Every thread of every block of the cluster; what was written to shared memory before is visible to all after. A block
// whose shared memory others read must reach one more cluster_sync() before it ends.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Reads what lies at `own_shared` (an address in this block's shared memory) in the block of that rank. T of 4 or 8
// bytes.
template <class T>
DEVICE T cluster_load(const T* own_shared, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "cluster_load reads 4 or 8 bytes");
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own_shared)), "r"(rank));
  union {
    T value;
    uint32_t word;
    uint64_t words;
  } got;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(got.word) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(got.words) : "r"(address) : "memory");
  }
  return got.value;
}

// --- stmatrix: ldmatrix's mirror -------------------------------------------------------------------------------------

// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned); r[i] is its fragment of matrix i.

DEVICE void stmatrix_x4(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// The columns of each matrix become rows.

DEVICE void stmatrix_x4_transposed(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#endif  // sm_90 and up

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- registers by warp group ----------------------------------------------------------------------------------------
// The limit of registers of each thread of this warp, a multiple of 8 in [24, 256]; all four warps of a warp group say
// the same. A raise blocks until others have lowered theirs.

template <int N>
DEVICE void register_raise() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
DEVICE void register_lower() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// --- wgmma: D[64, N] (fp32 registers of 128 threads) = A[64, 16] B[16, N] (+ D) a call ------------------------------

// Orders this thread's earlier register and shared-memory accesses before the wgmmas that follow: before the first one,
// and whenever accumulators or A's registers were touched since.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N committed groups run.
template <int N>
DEVICE void wgmma_wait() {
  static_assert(N >= 0 && N <= 7, "wgmma.wait_group takes 0 to 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads or writes of `registers` across this line: before wgmma_fence and after
// wgmma_wait, for accumulators that a loop carries. No instruction.
template <int COUNT>
DEVICE void wgmma_pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    asm volatile("" : "+f"(registers[i])::"memory");
  }
}

// Describes an operand in shared memory, in 8 x 16-byte cores; swizzle 0, 32, 64 or 128 bytes, tiles 8 * swizzle
// aligned.
//   K-major (K contiguous): row r of 16-byte chunk c stands at
//     swizzle 0: (r % 8) * 16 + (r / 8) * stride + c * leading
//     swizzle S: (r % 8) * S + (r / 8) * stride + c * 16      (leading unused: give 16)
//   transposed (M or N contiguous): chunk c (8 of M or N) of row k stands at
//     swizzle 0: c * stride + (k % 8) * 16 + (k / 8) * leading
//     swizzle S: (c % (S / 16)) * 16 + c / (S / 16) * leading + (k % 8) * S + (k / 8) * stride
// Bits 4.. of every address are then XORed with bits 7.. (1, 2 or 3 of them, for 32, 64, 128), as TMA with the same
// swizzle wrote them. One K step of 16 elements further in a K-major row: add 32 bytes to `shared`.
DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle) {
  return wgmma_descriptor_bits(shared_address(shared), leading_bytes, stride_bytes, swizzle);
}

template <class T>
struct ElementKind {
  static constexpr bool BF16 = false, FP16 = false;
};
template <>
struct ElementKind<bf16> {
  static constexpr bool BF16 = true, FP16 = false;
};
template <>
struct ElementKind<fp16> {
  static constexpr bool BF16 = false, FP16 = true;
};

// The registers of an accumulator as strings and as operands, by 32.
// clang-format off
#define MEGALITE_R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MEGALITE_R1 MEGALITE_R0 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MEGALITE_R2 MEGALITE_R1 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MEGALITE_R3 MEGALITE_R2 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MEGALITE_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MEGALITE_F16(i) MEGALITE_F4(i), MEGALITE_F4(i + 4), MEGALITE_F4(i + 8), MEGALITE_F4(i + 12)
#define MEGALITE_F32(i) MEGALITE_F16(i), MEGALITE_F16(i + 16)
// clang-format on
#define MEGALITE_D0 MEGALITE_F32(0)
#define MEGALITE_D1 MEGALITE_D0, MEGALITE_F32(32)
#define MEGALITE_D2 MEGALITE_D1, MEGALITE_F32(64)
#define MEGALITE_D3 MEGALITE_D2, MEGALITE_F32(96)

// One instruction: N, the element's name, R strings and D operands of the accumulator, then the numbers of the operands
// that follow it. SS: both operands in shared memory. RS: A in registers.
#define MEGALITE_SS(N, TYPE, R, D, A, B, P, TA, TB, ...)                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                 \
               ", 0;\n"                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" R "}, %" A ", %" B \
               ", p, 1, 1, %" TA ", %" TB ";\n}\n"                                                    \
               : D                                                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransA), "n"(TransB)          \
               : "memory")
#define MEGALITE_RS(N, TYPE, R, D, A0, A1, A2, A3, B, P, TB)                                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                               \
               ", 0;\n"                                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" R "}, {%" A0 ", %" A1 ", %" A2   \
               ", %" A3 "}, %" B ", p, 1, 1, %" TB ";\n}\n"                                                         \
               : D                                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransB) \
               : "memory")
#define MEGALITE_N64(FORM, TYPE) FORM("64", TYPE, MEGALITE_R0, MEGALITE_D0, "32", "33", "34", "35", "36", "37", "38")
#define MEGALITE_N128(FORM, TYPE) FORM("128", TYPE, MEGALITE_R1, MEGALITE_D1, "64", "65", "66", "67", "68", "69", "70")
#define MEGALITE_N192(FORM, TYPE) \
  FORM("192", TYPE, MEGALITE_R2, MEGALITE_D2, "96", "97", "98", "99", "100", "101", "102")
#define MEGALITE_N256(FORM, TYPE) \
  FORM("256", TYPE, MEGALITE_R3, MEGALITE_D3, "128", "129", "130", "131", "132", "133", "134")
#define MEGALITE_WGMMA(FORM)                                                                     \
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "wgmma: N is 64, 128, 192 or 256"); \
  static_assert(ElementKind<T>::BF16 || ElementKind<T>::FP16, "wgmma multiplies bf16 or fp16");  \
  if constexpr (N == 64 && ElementKind<T>::BF16) MEGALITE_N64(FORM, "bf16");                     \
  if constexpr (N == 128 && ElementKind<T>::BF16) MEGALITE_N128(FORM, "bf16");                   \
  if constexpr (N == 192 && ElementKind<T>::BF16) MEGALITE_N192(FORM, "bf16");                   \
  if constexpr (N == 256 && ElementKind<T>::BF16) MEGALITE_N256(FORM, "bf16");                   \
  if constexpr (N == 64 && ElementKind<T>::FP16) MEGALITE_N64(FORM, "f16");                      \
  if constexpr (N == 128 && ElementKind<T>::FP16) MEGALITE_N128(FORM, "f16");                    \
  if constexpr (N == 192 && ElementKind<T>::FP16) MEGALITE_N192(FORM, "f16");                    \
  if constexpr (N == 256 && ElementKind<T>::FP16) MEGALITE_N256(FORM, "f16")

// d = a b (+ d when `accumulate`): both operands in shared memory, of T (bf16 or fp16). Thread t of the warp group
// holds in d[i] row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column i / 4 * 8 + t % 4 * 2 + i % 2. TransA: A is
// M-major; TransB: B is N-major (a row of K has its N contiguous, as V in attention).
template <int N, class T, int TransA = 0, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  MEGALITE_WGMMA(MEGALITE_SS);
}

// The same with A in registers: a[r] holds row t / 32 * 16 + t % 32 / 4 + r % 2 * 8, columns r / 2 * 8 + t % 4 * 2 +
// {0, 1}: an accumulator's d[4 * c ..] packed by pairs is a[2 * (c % 2) ..] of the K step c / 2.
template <int N, class T, int TransB = 0>
DEVICE void wgmma_ra(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  MEGALITE_WGMMA(MEGALITE_RS);
}

#undef MEGALITE_SS
#undef MEGALITE_RS
#undef MEGALITE_WGMMA

#endif  // sm_90a

}  // namespace ptx
