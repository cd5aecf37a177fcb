// A tile of queries as the backward sees it: with its gradient and its saved row statistics.
#pragma once

#include "cpu/features.h"

namespace dijiang::cpu::DIJIANG_ISA {

template <typename Acc>
struct QueryTile {
  int64_t token = -1, rows = 0;  // the first token; -1 before any
  Acc* q = nullptr;              // (rows, dp)
  Acc* scaled_q = nullptr;       // q scale log2 e, where some keys are near
  Acc* grad = nullptr;           // (rows, vp): d out
  Acc* b = nullptr;              // (rows, mp): exponents
  Acc* plain = nullptr;          // (rows, mp): see Features::exponents
  Acc scale[kTile] = {};         // r
  Acc inverse[kTile] = {};       // 1 / den; 0 for a row without any weight
  Acc delta[kTile] = {};         // d out . out

  void allocate(Scratch& scratch, int64_t dp, int64_t vp, int64_t mp) {
    dp_ = dp;
    vp_ = vp;
    q = scratch.take<Acc>(kTile * dp);
    scaled_q = scratch.take<Acc>(kTile * dp);
    grad = scratch.take<Acc>(kTile * vp);
    out_ = scratch.take<Acc>(kTile * vp);
    b = scratch.take<Acc>(kTile * mp);
    plain = scratch.take<Acc>(kTile * mp);
  }

  void load(const LinearAttentionBackwardParams& params, const Features<Acc>& features,
            int64_t batch, int64_t head, int64_t first_token, int64_t count) {
    const LinearAttentionParams& p = params.forward;
    token = first_token;
    rows = count;
    load_tile(p.dtype, p.q, batch, head, token, rows, p.headdim, q, dp_);
    load_tile(p.dtype, params.grad_out, batch, head, token, rows, p.headdim_v, grad, vp_);
    const Acc factor = static_cast<Acc>(p.scale * kLog2E);
    const bool near = p.window > 0 || p.sinks > 0;
    for (int64_t i = 0; near && i < rows * dp_; ++i) scaled_q[i] = q[i] * factor;
    if (p.num_features > 0) features.exponents(q, rows, b, plain);
    const int64_t first = (batch * p.num_heads + head) * p.seqlen + token;
    if (p.normalize) {
      for (int64_t t = 0; t < rows; ++t) {
        const int64_t row = (first + t) * p.headdim_v;
        load_row(p.dtype, p.out, row, 1, p.headdim_v, out_ + t * vp_);
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      scale[t] = p.normalize ? static_cast<const Acc*>(p.row_scale)[first + t] : Acc(0);
      inverse[t] = p.normalize ? 1 / static_cast<const Acc*>(p.row_sum)[first + t] : Acc(1);
      Vec<Acc> sum{};
      for (int64_t j = 0; p.normalize && j < vp_; j += kLanes<Acc>) {
        const int64_t at = t * vp_ + j;
        sum = multiply_add(DIJIANG_ISA::load(grad + at), DIJIANG_ISA::load(out_ + at), sum);
      }
      delta[t] = horizontal_sum<Acc>(sum);
    }
  }

 private:
  int64_t dp_ = 0, vp_ = 0;
  Acc* out_ = nullptr;
};

}  // namespace dijiang::cpu::DIJIANG_ISA
