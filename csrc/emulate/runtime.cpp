// The emulator's runtime: one shared library for all kernels, built without instrumentation. See README.md.
#include <mutex>

#include "async_copy.h"
#include "atomics.h"
#include "barriers.h"
#include "cluster.h"
#include "collectives.h"
#include "intercept.h"
#include "matrix.h"
#include "scheduler.h"

extern "C" {
emulate::Dim3 emulate_thread_index() { return {uint32_t(emulate::state.current->thread), 0, 0}; }
emulate::Dim3 emulate_block_index() { return emulate::state.current->block->index; }
emulate::Dim3 emulate_block_size() { return {emulate::state.launch->threads, 1, 1}; }
emulate::Dim3 emulate_grid_size() {
  const uint32_t* grid = emulate::state.launch->grid;
  return {grid[0], grid[1], grid[2]};
}
unsigned char* emulate_shared_memory() { return emulate::state.current->block->shared; }

// Opens the launch's memory: afterwards emulate_translate gives where a tensor's byte lies for the kernel.
int emulate_open(const emulate::Launch* launch) {
  using namespace emulate;
  state.launch = launch, state.failed = false, state.current = nullptr;
  if (arena.open(*launch)) return 0;
  fail("no address space for the copies of %u tensors: %s", launch->region_count, strerror(errno));
  arena.close(false);
  return 1;
}

void* emulate_translate(void* host) { return emulate::arena.translate(static_cast<unsigned char*>(host)); }

// Runs the launch that emulate_open has opened, and closes it; 0, or 1 with launch->message filled in.
int emulate_run(const emulate::Launch* launch) {
  using namespace emulate;
  state.report = Report{};
  state.random.state = launch->seed;
  state.cluster_size = int(launch->cluster);
  global_shadow.open();
  if (allocate()) {
    run_grid();
  } else {
    fail("no address space for the stacks of %d threads", state.threads() * state.cluster_size);
  }
  *launch->report = state.report;
  global_shadow.close();
  arena.close(!state.failed);
  return state.failed;
}
}
