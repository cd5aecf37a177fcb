#include "cpu/sequence_split.h"

#include <algorithm>

namespace dijiang::cpu {
namespace {

constexpr int64_t kMaxParts = 64;
constexpr int64_t kLeastRows = 256;  // of a part: below, a task's own set-up shows
constexpr int64_t kAlign = 64;       // parts begin where a tile does

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many parts take the least time, counted in 64 x 64 x 64 products a tile: two for a tile's
// keys, about 3.3 for each query head.
int64_t best_parts(int64_t tasks, int64_t groups, int64_t longest, int64_t threads) {
  const double keys = 2, all = keys + 3.3 * static_cast<double>(groups);
  const int64_t most = std::min(kMaxParts, longest / kLeastRows);
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const double share = 1.0 / static_cast<double>(parts);
    const double time = divide_up(tasks, threads) * keys * (1 - share) +
                        divide_up(tasks * parts, threads) * all * share;
    if (parts == 1 || time < 0.95 * least) {
      best = parts;
      least = time;
    }
  }
  return best;
}

}  // namespace

void SequenceSplit::Boundary::allocate(const LinearAttentionParams& p, int64_t num_seqs) {
  const size_t acc = p.dtype == DType::kFloat64 ? 8 : 4;
  const size_t element = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t rows = num_seqs * p.num_kv_heads, m = p.num_features;
  kv.resize(rows * m * p.headdim_v * acc);
  z.resize(rows * m * acc);
  log_scale.resize(rows * m * acc);
  window_k.resize(rows * 2 * p.window * p.headdim * element);
  window_v.resize(rows * 2 * p.window * p.headdim_v * element);
  window_decay.resize(p.log_decay ? rows * 2 * p.window * acc : 0);
  sink_k.resize(rows * p.sinks * p.headdim * element);
  sink_v.resize(rows * p.sinks * p.headdim_v * element);
  length.resize(num_seqs);
  written.resize(num_seqs);
}

AttentionState SequenceSplit::Boundary::state(const LinearAttentionParams& p, bool to_write) {
  AttentionState s;
  if (p.num_features > 0) {
    s.kv = kv.data();
    s.z = z.data();
    s.log_scale = log_scale.data();
  }
  if (p.window > 0) {
    s.window_k = window_k.data();
    s.window_v = window_v.data();
    if (p.log_decay) s.window_decay = window_decay.data();
  }
  if (p.sinks > 0) {
    s.sink_k = sink_k.data();
    s.sink_v = sink_v.data();
  }
  if (p.window > 0 || p.sinks > 0) s.length = to_write ? written.data() : length.data();
  return s;
}

SequenceSplit::SequenceSplit(const LinearAttentionParams& params, int64_t num_threads) {
  const int64_t num_seqs = params.segments ? params.num_seqs : params.batch;
  tasks_ = linear_attention_num_tasks(params);
  struct Tokens {
    int32_t batch;
    int64_t begin, end;
  };
  std::vector<Tokens> tokens(num_seqs);
  int64_t longest = 0;
  for (int64_t n = 0; n < num_seqs; ++n) {
    const int32_t* s = params.segments ? params.segments + 3 * n : nullptr;
    tokens[n] = s ? Tokens{s[0], s[1], s[2]} : Tokens{static_cast<int32_t>(n), 0, params.seqlen};
    longest = std::max(longest, tokens[n].end - tokens[n].begin);
  }
  int64_t parts = 1;
  if (tasks_ > 0 && num_threads > 1 && params.headdim_v > 0) {
    parts = best_parts(tasks_, params.num_heads / params.num_kv_heads, longest, num_threads);
  }
  parts_.resize(parts);
  boundaries_.resize(parts - 1);
  for (int64_t i = 0; i < parts; ++i) parts_[i].params = params;
  if (parts == 1) return;

  for (int64_t i = 0; i < parts; ++i) {
    Part& part = parts_[i];
    part.segments.resize(3 * num_seqs);
    if (i + 1 < parts) boundaries_[i].allocate(params, num_seqs);
    for (int64_t n = 0; n < num_seqs; ++n) {
      const int64_t begin = tokens[n].begin, count = tokens[n].end - begin;
      const auto cut = [&](int64_t j) {
        return begin + (j == parts ? count : count * j / parts / kAlign * kAlign);
      };
      part.segments[3 * n] = tokens[n].batch;
      part.segments[3 * n + 1] = static_cast<int32_t>(cut(i));
      part.segments[3 * n + 2] = static_cast<int32_t>(cut(i + 1));
      const int64_t before = params.initial.length ? params.initial.length[n] : 0;
      if (i + 1 < parts) boundaries_[i].length[n] = before + cut(i + 1) - begin;
    }
    part.params.segments = part.segments.data();
    part.params.num_seqs = num_seqs;
    if (i > 0) part.params.initial = boundaries_[i - 1].state(params, false);
    if (i + 1 < parts) part.params.final = boundaries_[i].state(params, true);
  }
}

void SequenceSplit::run_states(int64_t begin, int64_t end) const {
  for (int64_t task = begin; task < end; ++task) {
    for (int64_t i = 0; i + 1 < num_parts(); ++i) {
      LinearAttentionParams keys = parts_[i].params;
      keys.num_heads = 0;  // nothing but the state
      linear_attention_forward(keys, task, task + 1);
    }
  }
}

void SequenceSplit::run(int64_t begin, int64_t end) const {
  while (begin < end) {
    const int64_t part = begin / tasks_, first = begin % tasks_;
    const int64_t count = std::min(end - begin, tasks_ - first);
    LinearAttentionParams params = parts_[part].params;
    if (part + 1 < num_parts()) params.final = {};  // the first pass wrote it
    linear_attention_forward(params, first, first + count);
    begin += count;
  }
}

}  // namespace dijiang::cpu
