// The backward's workspace: what tasks leave for linear_attention_backward_finish to sum, in
// double. No instruction set of its own.
#pragma once

#include "dijiang/core/linear_attention.h"

namespace dijiang::cpu {

class BackwardWorkspace {
 public:
  explicit BackwardWorkspace(const LinearAttentionBackwardParams& params)
      : p_(params.forward), base_(static_cast<double*>(params.workspace)) {}

  // Gradients of one head's feature parameters: omega (m, d), log_weight (m), beta.
  int64_t row_size() const { return given() ? 0 : p_.num_features * (p_.headdim + 1) + 1; }
  int64_t groups() const { return p_.num_heads / p_.num_kv_heads; }
  int64_t num_seqs() const { return p_.segments ? p_.num_seqs : p_.batch; }

  // Row g < groups: query head g of the task; row groups: its kv head.
  double* row(int64_t sequence, int64_t kv_head, int64_t g) const {
    return base_ + ((sequence * p_.num_kv_heads + kv_head) * (groups() + 1) + g) * row_size();
  }
  // d loss / d c_t of one (batch, kv head): (seqlen).
  double* decay(int64_t batch, int64_t kv_head) const {
    return base_ + rows() + (batch * p_.num_kv_heads + kv_head) * p_.seqlen;
  }
  size_t bytes() const {
    const int64_t decay = p_.log_decay ? p_.batch * p_.num_kv_heads * p_.seqlen : 0;
    return (rows() + decay) * sizeof(double);
  }

 private:
  bool given() const { return p_.kind == FeatureKind::kGiven || p_.num_features == 0; }
  int64_t rows() const { return num_seqs() * p_.num_kv_heads * (groups() + 1) * row_size(); }

  const LinearAttentionParams& p_;
  double* base_;
};

}  // namespace dijiang::cpu
