// Clusters: blocks that live at the same time, meet at a barrier, and read each other's shared memory (DSMEM).
#pragma once

#include "barriers.h"
#include "intercept.h"

namespace emulate {

inline void load_from_cluster(void* to, const void* own_shared, int rank, int bytes, uintptr_t pc) {
  Fiber& me = *state.current;
  const size_t offset = static_cast<const unsigned char*>(own_shared) - me.block->shared;
  const unsigned long where = module_offset(pc);
  if (rank < 0 || rank >= state.cluster_size) {
    return fail("cluster_load @%lx of block rank %d; the cluster has %d blocks", where, rank, state.cluster_size);
  }
  if (offset + bytes > state.launch->shared_bytes) {
    return fail("cluster_load @%lx of byte %ld of shared memory, which has %u", where, long(offset),
                state.launch->shared_bytes);
  }
  if (offset % bytes) return fail_misaligned(own_shared, bytes, "cluster_load reads", pc);
  Block& block = state.blocks[rank];
  if (block.live == 0) {
    return fail("cluster_load @%lx of block rank %d, which has left the kernel: a cluster_sync must keep it", where,
                rank);
  }
  shadow_read(block, me.agent, offset, bytes, pc);
  if (&block != me.block) note_reader(block, me.agent);
  memcpy(to, block.shared + offset, bytes);
}

}  // namespace emulate

extern "C" {
int emulate_cluster_rank() { return emulate::state.current->block->rank; }
int emulate_cluster_size() { return emulate::state.cluster_size; }

void emulate_cluster_sync() {
  using namespace emulate;
  check_all_live("cluster_sync", EMULATE_PC);
  arrive(state.cluster_barrier, "cluster_sync", state.threads() * state.cluster_size, true, EMULATE_PC);
}

void emulate_cluster_load(void* to, const void* own_shared, int rank, int bytes) {
  emulate::load_from_cluster(to, own_shared, rank, bytes, EMULATE_PC);
}
}
