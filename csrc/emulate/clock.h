// Vector clocks: who knows of whose accesses. Two accesses to the same byte race unless one's agent knew of the other.
//
// An agent is a thread of the cluster, or that thread's asynchronous copies (agent + number of threads). Its clock is
// `base` (what it has learnt of all agents, shared between agents that left the same barrier) and `now` (its own time,
// which grows at each synchronisation). An access at time t is known to those whose base has at least t for its agent.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace emulate {

struct Clock {
  int references = 0;
  std::vector<uint32_t> at;
};

// Clocks of one length, reused: a block-wide barrier of 1024 threads would else allocate at each turn.
class ClockPool {
 public:
  void resize(int agents) {
    if (agents == agents_) return;
    for (Clock* clock : all_) delete clock;
    all_.clear(), free_.clear(), agents_ = agents;
  }
  Clock* make() {
    Clock* clock;
    if (free_.empty()) {
      all_.push_back(clock = new Clock), clock->at.resize(agents_);
    } else {
      clock = free_.back(), free_.pop_back();
      std::fill(clock->at.begin(), clock->at.end(), 0);
    }
    clock->references = 1;
    return clock;
  }
  Clock* share(Clock* clock) {
    clock->references++;
    return clock;
  }
  void drop(Clock* clock) {
    if (clock && --clock->references == 0) free_.push_back(clock);
  }
  // Everything handed out is free again: after a launch that failed.
  void reset() { free_ = all_; }

 private:
  int agents_ = 0;
  std::vector<Clock*> all_, free_;
};

inline ClockPool clocks;

struct Agent {
  int index = 0;
  uint32_t now = 1;
  Clock* base = nullptr;

  bool knows(uint32_t agent, uint32_t time) const { return agent == uint32_t(index) || base->at[agent] >= time; }
};

inline void merge(Clock* into, const Clock* from) {
  uint32_t* a = into->at.data();
  const uint32_t* b = from->at.data();
  for (size_t i = 0, n = into->at.size(); i < n; i++) a[i] = std::max(a[i], b[i]);
}

// What a barrier's phase hands from those who arrive to those who wait.
class Release {
 public:
  // All that `agent` did or knew until now becomes known to those who acquire this phase.
  void arrive(Agent& agent) {
    if (!clock_) clock_ = clocks.make();
    if (agent.base != last_) {
      merge(clock_, agent.base);
      forget();
      last_ = clocks.share(agent.base);
    }
    clock_->at[agent.index] = std::max(clock_->at[agent.index], agent.now++);
  }
  // An asynchronous copy `agent` completed at `time`; `known` is what its issuer knew.
  void complete(int agent, uint32_t time, const Clock* known) {
    if (!clock_) clock_ = clocks.make();
    merge(clock_, known);
    forget();
    clock_->at[agent] = std::max(clock_->at[agent], time);
  }
  // Ends the phase: the caller owns the clock returned (drop it), and the next phase starts with nothing.
  Clock* seal() {
    Clock* sealed = clock_ ? clock_ : clocks.make();
    clock_ = nullptr;
    forget();
    return sealed;
  }
  void clear() { clock_ = nullptr, last_ = nullptr; }

 private:
  void forget() {
    clocks.drop(last_);
    last_ = nullptr;
  }

  Clock* clock_ = nullptr;
  // The base merged last: threads of a warp mostly share one. Held, for a phase may last long, and a clock that was
  // given back would come again with another content under the same address.
  Clock* last_ = nullptr;
};

// `agent` learns all of `clock`. `dominates`: the agent itself arrived in that phase, so the clock has all it knew.
inline void acquire(Agent& agent, Clock* clock, bool dominates) {
  Clock* next;
  if (dominates) {
    next = clocks.share(clock);
  } else {
    next = clocks.make();
    merge(next, agent.base), merge(next, clock);
  }
  clocks.drop(agent.base);
  agent.base = next;
}

}  // namespace emulate
