// Fibers: one stack and one instruction pointer per CUDA thread, switched by hand.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

// EMULATE_UCONTEXT takes the portable way, which is several times slower, on x86-64 too: a test does.
#if defined(__x86_64__) && !defined(EMULATE_UCONTEXT)
#define EMULATE_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulate {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr uint64_t STACK_END = 0x5ca1ab1e0ddba11;  // at the low end of each stack: gone if it overflowed

struct Context {
#ifdef EMULATE_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

#ifdef EMULATE_SWITCH
// What the C ABI asks a call to keep, on the stack that is left; the rest the compiler has saved around the call.
extern "C" void emulate_switch(void** save, void* to);
asm(R"(
.text
.globl emulate_switch
.hidden emulate_switch
.type emulate_switch,@function
emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulate_switch, .-emulate_switch
)");

inline void switch_context(Context& from, Context& to) { emulate_switch(&from.stack_pointer, to.stack_pointer); }

inline void prepare_context(Context& context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
  *--top = nullptr;  // a call's return address would stand here: `entry` never returns, and sees the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}
#else
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare_context(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = STACK_BYTES;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

// Stacks of all fibers, side by side, kept between launches; pages that no thread touched take no memory.
inline unsigned char* stacks(size_t fibers) {
  static unsigned char* base = nullptr;
  static size_t count = 0;
  if (fibers <= count) return base;
  if (base) munmap(base, count * STACK_BYTES);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* got = mmap(nullptr, fibers * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (got == MAP_FAILED) {
    base = nullptr, count = 0;
    return nullptr;
  }
  base = static_cast<unsigned char*>(got), count = fibers;
  for (size_t i = 0; i < count; i++) *reinterpret_cast<uint64_t*>(base + i * STACK_BYTES) = STACK_END;
  return base;
}

}  // namespace emulate
