// Causal attention with positive features, near-exact keys and a carried state: one definition
// for features given (causal_linear_attention) and for features computed inside
// (kernelized_attention). docs/numerics.md derives every formula used here.
//
//   o_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + eps)
//   w_ts = exp(scale q_t.k_s)                              s near: a sink, in t's window, or hard
//   w_ts = exp(c_t - c_s) sum_i phi_i(q_t) phi_i(k_s)      s far: every other s <= t
//
// "Acc" below is double when dtype is kFloat64 and float otherwise: the type of all state,
// feature parameters, row statistics and accumulation. All Acc buffers are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "dijiang/core/types.h"

namespace dijiang {

// log phi of the query side has num_heads rows of parameters, the key side num_kv_heads.
struct FeatureParams {
  const void* omega = nullptr;       // Acc (heads, num_features, headdim)
  const void* log_weight = nullptr;  // Acc (heads, num_features); null: 0
  const void* beta = nullptr;        // Acc (heads); null: 0
  // The CPU's alone; other backends take a matrix for every head.
  // dct: omega is Acc (heads, num_features), and row i of the matrix omega_i times row i mod
  // headdim of the orthonormal DCT-II matrix. group: head h reads row h / group of omega.
  bool dct = false;
  int64_t group = 1;
};

struct FeatureGrads {
  void* omega = nullptr;       // Acc, as FeatureParams::omega
  void* log_weight = nullptr;  // Acc (heads, num_features)
  void* beta = nullptr;        // Acc (heads)

  bool wanted() const { return omega != nullptr || log_weight != nullptr || beta != nullptr; }
};

// Of hard keys: one slot in kNovelSlots goes to the most novel keys, the others to those that
// queries look at; votes count kCarriedVotes times when the next choice is made.
constexpr int64_t kNovelSlots = 2;
constexpr double kCarriedVotes = 0.5;

// How many hard keys each kv head keeps: all as many, or each its own number. A state holds those
// of a sequence head behind head.
struct CacheSizes {
  static constexpr int64_t kMostHeads = 128;  // with a number of their own

  int64_t most = 0;  // of any head
  bool own = false;
  int32_t first[kMostHeads + 1] = {};  // own: slots of the heads before

  DIJIANG_HOST_DEVICE int64_t of(int64_t head) const {
    return own ? first[head + 1] - first[head] : most;
  }
  DIJIANG_HOST_DEVICE int64_t all(int64_t heads) const { return own ? first[heads] : heads * most; }
  // A head's first slot in a state of num_heads heads a sequence.
  DIJIANG_HOST_DEVICE int64_t slot(int64_t sequence, int64_t head, int64_t num_heads) const {
    return sequence * all(num_heads) + (own ? first[head] : head * most);
  }
  // Likewise its first vote; every head has `window` more of them than slots.
  DIJIANG_HOST_DEVICE int64_t vote(int64_t sequence, int64_t head, int64_t num_heads,
                                   int64_t window) const {
    return slot(sequence, head, num_heads) + (sequence * num_heads + head) * window;
  }
};

// The constant-size memory of one batch of sequences. True S = kv * 2^log_scale, true
// z = z * 2^log_scale, both referred to the time of the last folded key. log_scale holds whole
// numbers (scaling is then exact) and kEmptyLogScale where nothing was folded.
// With a window w, position p lives in slot p mod 2w of the window buffers; what slots no longer
// (or not yet) in the window hold is unspecified.
struct AttentionState {
  void* kv = nullptr;            // Acc (num_seqs, kv heads, num_features, headdim_v)
  void* z = nullptr;             // Acc (num_seqs, kv heads, num_features)
  void* log_scale = nullptr;     // Acc (num_seqs, kv heads, num_features)
  void* window_k = nullptr;      // dtype (num_seqs, kv heads, 2 window, headdim)
  void* window_v = nullptr;      // dtype (num_seqs, kv heads, 2 window, headdim_v)
  void* window_decay = nullptr;  // Acc (num_seqs, kv heads, 2 window): log_decay; null: no decay
  void* sink_k = nullptr;        // dtype (num_seqs, kv heads, sinks, headdim)
  void* sink_v = nullptr;        // dtype (num_seqs, kv heads, sinks, headdim_v)
  int64_t* length = nullptr;     // (num_seqs): tokens seen so far; null when window = sinks = 0
  // With a cache of hard keys; all null without one. A head's slots, c of them, fill up from the
  // first on; (kv heads, c) lies head behind head where c differs.
  void* cache_k = nullptr;            // dtype (num_seqs, kv heads, c, headdim)
  void* cache_v = nullptr;            // dtype (num_seqs, kv heads, c, headdim_v)
  int64_t* cache_position = nullptr;  // (num_seqs, kv heads, c); -1: an empty slot
  void* cache_decay = nullptr;  // Acc (num_seqs, kv heads, c): log_decay of the tokens after the
                                // key, up to the last folded one; null: no decay
  void* votes = nullptr;  // Acc (num_seqs, kv heads, c + window): for the slots and for the block
                          // before the newest
  void* sums = nullptr;   // Acc (num_seqs, kv heads, headdim + headdim_v): of all keys so far, and
                          // of their values
};

struct LinearAttentionParams {
  DType dtype = DType::kFloat32;  // of q, k, v, out
  FeatureKind kind = FeatureKind::kGiven;

  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_heads; head h reads kv head h / (num_heads/num_kv_heads)
  int64_t seqlen = 0;
  int64_t headdim = 0;  // last dim of q and k; equals num_features for kGiven
  int64_t headdim_v = 0;
  int64_t num_features = 0;  // 0: no far term at all (window and sinks alone)

  ConstView q;  // (batch, num_heads, seqlen, headdim)
  ConstView k;  // (batch, num_kv_heads, seqlen, headdim)
  ConstView v;  // (batch, num_kv_heads, seqlen, headdim_v)
  FeatureParams fq;
  FeatureParams fk;

  double scale = 1.0;  // of q.k; unused for kGiven
  int64_t window = 0;  // block size w; near = own block and the one before. 0: no window
  int64_t sinks = 0;   // the first `sinks` tokens of a sequence stay exact
  // Keys that stay exact beyond the window, a sequence and kv head: docs/numerics.md, "Hard keys".
  // Needs a window. Of the block with number j in this call, slot i of head h holds position
  // chosen[h, cache_row + j, i]; -1: nothing.
  CacheSizes cache;
  const int32_t* given = nullptr;  // (kv heads, cache_rows(), cache.most); null: chosen here
  int32_t* chosen = nullptr;       // as given; null: not wanted
  bool normalize = true;
  double eps = 0.0;  // added to the true (unscaled) denominator

  // log g_t <= 0: Acc (batch, kv heads, seqlen) with strides in elements (0 where shared); null: 0
  const void* log_decay = nullptr;
  int64_t log_decay_stride_batch = 0;
  int64_t log_decay_stride_head = 0;
  int64_t log_decay_stride_seq = 0;

  // Sequences: int32 rows (batch index, begin, end). They do not overlap; tokens in none of them
  // are padding: their output and gradients are 0. null: num_seqs = batch, each [0, seqlen).
  const int32_t* segments = nullptr;
  int64_t num_seqs = 0;

  int64_t cache_rows() const { return window > 0 ? batch * seqlen / window + 2 * num_seqs : 0; }
  // Rows before those of a sequence, in ascending order of its first token in memory.
  int64_t cache_row(int64_t sequence, int64_t first_token) const {
    return first_token / window + 2 * sequence;
  }

  AttentionState initial;  // kv null: empty. Never written
  AttentionState final;    // kv null (or, with num_features = 0, length null): not wanted

  void* out = nullptr;  // dtype (batch, num_heads, seqlen, headdim_v), contiguous
  // The exact denominator is row_sum * 2^row_scale, row_scale whole and row_sum in [1, 2);
  // row_sum = +inf marks a row without any weight (its output is 0). normalize = false: 1 and 0.
  void* row_scale = nullptr;  // Acc (batch, num_heads, seqlen); null: not wanted
  void* row_sum = nullptr;    // Acc (batch, num_heads, seqlen); null: not wanted
};

struct LinearAttentionBackwardParams {
  LinearAttentionParams forward;  // out, row_scale, row_sum as the forward left them; final unused

  ConstView grad_out;                   // dtype (batch, num_heads, seqlen, headdim_v)
  const void* grad_final_kv = nullptr;  // Acc, as final.kv (gradient of the stored, scaled value)
  const void* grad_final_z = nullptr;   // Acc, as final.z
  const void* final_kv = nullptr;       // Acc: the forward's final state; null unless
  const void* final_z = nullptr;        //   grad_final_* are given
  const void* final_log_scale = nullptr;

  void* grad_q = nullptr;  // dtype (batch, num_heads, seqlen, headdim), contiguous
  void* grad_k = nullptr;  // dtype (batch, num_kv_heads, seqlen, headdim), contiguous
  void* grad_v = nullptr;  // dtype (batch, num_kv_heads, seqlen, headdim_v), contiguous
  FeatureGrads grad_fq;    // summed over batch and sequences; null members: not wanted
  FeatureGrads grad_fk;
  void* grad_log_decay = nullptr;   // Acc (batch, num_kv_heads, seqlen), contiguous; null: no decay
  void* grad_initial_kv = nullptr;  // Acc, as initial.kv; null: not wanted
  void* grad_initial_z = nullptr;
  void* workspace = nullptr;  // *_backward_workspace bytes
};

namespace cpu {

// A task is one (sequence, kv head); tasks are independent, so any thread may run any range.
int64_t linear_attention_num_tasks(const LinearAttentionParams& params);

// Tokens [begin, end) of a task's sequence, counted from its first; an end beyond the last token is
// the last. Pieces of a task are independent too: one that begins later first walks over the keys
// before it (the backward's keys: over the queries after it) for their state alone.
struct AttentionPiece {
  int64_t task = 0, begin = 0, end = std::numeric_limits<int64_t>::max();
};

// Writes out, row_scale and row_sum of pieces [begin, end), and final where one ends its sequence.
// The caller zeroes out first when segments leave padding. initial and final may be the same memory
// only where no task is cut.
void linear_attention_forward(const LinearAttentionParams& params,
                              const std::vector<AttentionPiece>& pieces, int64_t begin,
                              int64_t end);
// Whole tasks [begin, end).
void linear_attention_forward(const LinearAttentionParams& params, int64_t begin, int64_t end);

// The backward goes over each sequence twice: forwards in time for the queries' gradients,
// backwards for the keys' and values'. Each is cut into pieces of its own; slot numbers the pieces
// of a half.
enum class BackwardHalf { kQueries, kKeys };
struct BackwardPiece : AttentionPiece {
  BackwardHalf half = BackwardHalf::kQueries;
  int64_t slot = 0;
};

// The caller zeroes grad_q, grad_k, grad_v, grad_log_decay first when segments leave padding.
// Pieces may run in any order and on any thread, before linear_attention_backward_finish sums what
// they left in the workspace (of linear_attention_backward_workspace bytes).
size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params,
                                           const std::vector<BackwardPiece>& pieces);
void linear_attention_backward(const LinearAttentionBackwardParams& params,
                               const std::vector<BackwardPiece>& pieces, int64_t begin,
                               int64_t end);
void linear_attention_backward_finish(const LinearAttentionBackwardParams& params,
                                      const std::vector<BackwardPiece>& pieces);

// One token a sequence (seqlen = 1, segments null): reads and writes `final` in place, ignores
// `initial`. The state must exist (kv, and length when window or sinks are set). Every kv head of a
// sequence reads final.length, so only the finish, after all tasks, adds 1 to it.
void linear_attention_update(const LinearAttentionParams& params, int64_t begin, int64_t end);
void linear_attention_update_finish(const LinearAttentionParams& params);

}  // namespace cpu
}  // namespace dijiang
