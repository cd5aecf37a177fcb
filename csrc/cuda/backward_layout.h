// What the backward keeps beside the forward's workspace.
#pragma once

#include "cuda/attention_layout.h"

namespace dijiang::cuda {

constexpr float kSafeExponent = 60.0f;  // rows of larger features are done term by term

struct BackwardWork {
  // over query tokens (batch, heads, seqlen)
  float* delta;         // do . o
  float* inverse;       // 1 / row_sum; 0 for a row without weight
  uint8_t* unsafe;      // rows whose features overflow relative to the chunk's maxima
  float* grad_b;        // (.., num_features): of the query exponents
  float* near_q;        // (.., headdim): near part of grad_q; null: no near keys
  float* query_total;   // sum over features of grad_b: what c_t gets
  float* query_square;  // |x|^2 times that: what beta gets
  // over key tokens (batch, kv heads, seqlen)
  float* grad_a;
  float* near_k;
  float* grad_v;  // (.., headdim_v)
  float* key_total;
  float* key_square;
  // over chunks
  float* inner_g;     // (chunk, heads, 64, 64): (do . v - delta) / den, queries by keys, decayed
                      // (in unsafe rows not: there decay goes into each term)
  float* inner_p;     // likewise: the far weights over den
  float* reverse_kv;  // (chunk, kv heads, num_features, headdim_v): R local, then after the chunk
  float* reverse_z;   // (.., num_features): rho
  float* reverse_local;  // its maxima
  float* reverse_scale;
  float* sinks;  // (chunk, row tile, heads, sinks, headdim + headdim_v): parts of dk, dv
  // parameter gradients, (split, heads, num_features, headdim + 1): omega's, and log_weight's
  float* parameters;
  int splits;
};

struct Backward {
  Attention forward;
  LinearAttentionBackwardParams params;
  BackwardWork work;
};

inline Backward plan_backward(const LinearAttentionBackwardParams& params, Arena& arena) {
  Backward b{};
  b.params = params;
  b.forward = plan_attention(params.forward, arena);
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const int64_t rows = p.batch * p.num_heads * p.seqlen;
  const int64_t key_rows = p.batch * p.num_kv_heads * p.seqlen;
  const int64_t m = p.num_features, cells = a.max_chunks * p.num_kv_heads;
  const bool near = p.window > 0 || p.sinks > 0;
  BackwardWork& w = b.work;
  w.delta = arena.take<float>(rows);
  w.inverse = arena.take<float>(rows);
  w.unsafe = arena.take<uint8_t>(rows);
  w.grad_b = arena.take<float>(rows * m);
  w.near_q = arena.take<float>(near ? rows * p.headdim : 0);
  w.query_total = arena.take<float>(rows);
  w.query_square = arena.take<float>(rows);
  w.grad_a = arena.take<float>(key_rows * m);
  w.near_k = arena.take<float>(near ? key_rows * p.headdim : 0);
  w.grad_v = arena.take<float>(key_rows * p.headdim_v);
  w.key_total = arena.take<float>(key_rows);
  w.key_square = arena.take<float>(key_rows);
  const int64_t inner = a.has_inner ? a.max_chunks * p.num_heads * kRows * kRows : 0;
  w.inner_g = arena.take<float>(inner);
  w.inner_p = arena.take<float>(inner);
  w.reverse_kv = arena.take<float>(cells * m * p.headdim_v);
  w.reverse_z = arena.take<float>(cells * m);
  w.reverse_local = arena.take<float>(cells * m);
  w.reverse_scale = arena.take<float>(cells * m);
  w.sinks = arena.take<float>(a.max_chunks * a.row_tiles * p.num_heads * p.sinks *
                              (p.headdim + p.headdim_v));
  const int64_t tokens = p.batch * p.seqlen;
  w.splits = static_cast<int>(tokens < 1024 ? 1 : tokens > 16 * 1024 ? 16 : tokens / 1024);
  w.parameters = arena.take<float>(w.splits * p.num_heads * m * (p.headdim + 1));
  return b;
}

}  // namespace dijiang::cuda
