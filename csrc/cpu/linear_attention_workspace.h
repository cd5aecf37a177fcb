// The backward's workspace: what pieces leave for linear_attention_backward_finish to sum, in
// double. No instruction set of its own.
#pragma once

#include "cpu/parameter_rows.h"
#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

// Pieces of each half of the backward.
struct BackwardCounts {
  int64_t queries = 0, keys = 0;
};

class BackwardWorkspace {
 public:
  BackwardWorkspace(const LinearAttentionBackwardParams& params, BackwardCounts counts)
      : p_(params.forward),
        parameters_(params.grad_fq.wanted() || params.grad_fk.wanted()),
        counts_(counts),
        base_(static_cast<double*>(params.workspace)) {}

  // Gradients of one head's feature parameters; of queries and keys alike, for the larger omega.
  int64_t row_size() const {
    const bool given = p_.kind == FeatureKind::kGiven || p_.num_features == 0;
    const FeatureParams& larger = p_.fq.dct ? p_.fk : p_.fq;
    return given || !parameters_ ? 0 : parameter_row_size(larger, p_.num_features, p_.headdim);
  }
  int64_t groups() const { return p_.num_heads / p_.num_kv_heads; }

  // Of query head g of a piece of the queries; of a piece of the keys.
  double* query_row(int64_t slot, int64_t g) const {
    return base_ + (slot * groups() + g) * row_size();
  }
  double* key_row(int64_t slot) const { return query_row(counts_.queries, 0) + slot * row_size(); }

  // Gradients of the sinks, dk (sinks, headdim) and then dv (sinks, headdim_v): what one piece of
  // the queries adds to them; what the piece of the keys that holds them found itself.
  double* query_sinks(int64_t slot) const { return key_row(counts_.keys) + slot * sinks_size(); }
  double* key_sinks(int64_t slot) const { return query_sinks(counts_.queries + slot); }

  // d loss / d c_t of one (batch, kv head), (seqlen): what its queries add, and what its keys do.
  double* query_decay(int64_t batch, int64_t kv_head) const {
    return key_sinks(counts_.keys) + (batch * p_.num_kv_heads + kv_head) * p_.seqlen;
  }
  double* key_decay(int64_t batch, int64_t kv_head) const {
    return query_decay(p_.batch + batch, kv_head);
  }

  size_t size() const {
    const int64_t pieces = counts_.queries + counts_.keys;
    const int64_t rows = counts_.queries * groups() + counts_.keys;
    const int64_t decay = p_.log_decay ? 2 * p_.batch * p_.num_kv_heads * p_.seqlen : 0;
    return rows * row_size() + pieces * sinks_size() + decay;
  }
  int64_t sinks_size() const { return p_.sinks * (p_.headdim + p_.headdim_v); }

 private:
  const LinearAttentionParams& p_;
  const bool parameters_;  // whether any gradient of them is wanted
  const BackwardCounts counts_;
  double* base_;
};

}  // namespace dijiang::cpu
