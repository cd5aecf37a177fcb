// The forward of few long sequences over more threads than they have tasks: each sequence is cut
// into parts that begin from states found by a first pass over the keys alone.
#pragma once

#include <cstdint>
#include <vector>

#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

// First every state task, in any order and on any thread, then every task.
class SequenceSplit {
 public:
  SequenceSplit(const LinearAttentionParams& params, int64_t num_threads);

  int64_t num_parts() const { return static_cast<int64_t>(parts_.size()); }  // 1: not cut
  int64_t num_state_tasks() const { return num_parts() > 1 ? tasks_ : 0; }
  int64_t num_tasks() const { return num_parts() * tasks_; }
  void run_states(int64_t begin, int64_t end) const;
  void run(int64_t begin, int64_t end) const;

 private:
  // The state between two parts, a row a sequence, in memory of its own.
  struct Boundary {
    std::vector<char> kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v;
    std::vector<int64_t> length, written;  // known beforehand; as the kernel writes it
    void allocate(const LinearAttentionParams& p, int64_t num_seqs);
    AttentionState state(const LinearAttentionParams& p, bool to_write);
  };
  struct Part {
    std::vector<int32_t> segments;
    LinearAttentionParams params;
  };

  int64_t tasks_ = 0;  // of one part
  std::vector<Part> parts_;
  std::vector<Boundary> boundaries_;  // boundaries_[i] lies before parts_[i + 1]
};

}  // namespace dijiang::cpu
