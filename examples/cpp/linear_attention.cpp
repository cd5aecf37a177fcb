// Causal linear attention without torch: pointers and strides in, the same numbers out as the
// double loop below gives.
#include <cmath>
#include <cstdio>
#include <vector>

#include "dijiang/core/linear_attention.h"

int main() {
  const int64_t seqlen = 6, features = 4, values = 2;
  std::vector<float> q(seqlen * features), k(seqlen * features), v(seqlen * values);
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = std::exp(std::sin(0.7f * i));  // any positive feature map
    k[i] = std::exp(std::cos(1.3f * i));
  }
  for (size_t i = 0; i < v.size(); ++i) v[i] = std::sin(2.1f * i);
  std::vector<float> out(seqlen * values);

  dijiang::LinearAttentionParams p;
  p.batch = p.num_heads = p.num_kv_heads = 1;
  p.seqlen = seqlen;
  p.headdim = p.num_features = features;
  p.headdim_v = values;
  p.q = {q.data(), 0, 0, features, 1};
  p.k = {k.data(), 0, 0, features, 1};
  p.v = {v.data(), 0, 0, values, 1};
  p.out = out.data();
  dijiang::cpu::linear_attention_forward(p, 0, dijiang::cpu::linear_attention_num_tasks(p));

  double worst = 0;
  for (int64_t t = 0; t < seqlen; ++t) {
    for (int64_t c = 0; c < values; ++c) {
      double sum = 0, weights = 0;
      for (int64_t s = 0; s <= t; ++s) {
        double w = 0;
        for (int64_t i = 0; i < features; ++i) w += q[t * features + i] * k[s * features + i];
        sum += w * v[s * values + c];
        weights += w;
      }
      worst = std::fmax(worst, std::fabs(out[t * values + c] - sum / weights));
    }
    std::printf("o_%d = (%9.6f, %9.6f)\n", int(t), out[t * values], out[t * values + 1]);
  }
  std::printf("largest difference from the double loop: %.1e\n", worst);
  return worst < 1e-6 ? 0 : 1;
}
