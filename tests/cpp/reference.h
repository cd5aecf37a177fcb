// The function of docs/numerics.md, "The function", in double precision and without any trick:
// every weight of the T x T matrix, one after the other. Tests hold the kernels against it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "dijiang/core/linear_attention.h"

namespace dijiang::reference {

using Array = std::vector<double>;

// One problem with all tensors contiguous. Empty arrays are absent.
struct Problem {
  FeatureKind kind = FeatureKind::kExp;
  int64_t batch = 1, heads = 2, kv_heads = 1, seqlen = 0, d = 4, dv = 3, m = 5;
  double scale = 1.0;
  int64_t window = 0, sinks = 0;
  bool normalize = true;
  double eps = 0.0;
  Array q, k, v;                    // (batch, heads or kv_heads, seqlen, d or dv)
  Array omega_q, weight_q, beta_q;  // (heads, m, d), (heads, m), (heads)
  Array omega_k, weight_k, beta_k;  // the same of kv_heads
  Array log_decay;                  // (batch, kv_heads, seqlen)
  Array kv, z;                      // initial state, true values (no log_scale), for window = 0
  std::vector<int32_t> segments;    // (batch, begin, end) rows

  int64_t groups() const { return heads / kv_heads; }
  int64_t num_seqs() const {
    return segments.empty() ? batch : static_cast<int64_t>(segments.size()) / 3;
  }
};

struct Range {
  int64_t batch, begin, end;
};
inline Range range_of(const Problem& p, int64_t sequence) {
  if (p.segments.empty()) return {sequence, 0, p.seqlen};
  const int32_t* s = &p.segments[3 * sequence];
  return {s[0], s[1], s[2]};
}

// Natural log phi of one row x, for the given head's parameters.
inline Array log_phi(const Problem& p, const double* x, const Array& omega, const Array& weight,
                     const Array& beta, int64_t head) {
  Array result(p.m);
  if (p.kind == FeatureKind::kGiven) {
    for (int64_t i = 0; i < p.m; ++i) result[i] = std::log(x[i]);
    return result;
  }
  const double root = std::sqrt(p.scale);
  double norm = 0;
  for (int64_t j = 0; j < p.d; ++j) norm += p.scale * x[j] * x[j];
  for (int64_t i = 0; i < p.m; ++i) {
    double u = 0;
    for (int64_t j = 0; j < p.d; ++j) u += omega[(head * p.m + i) * p.d + j] * root * x[j];
    result[i] = u;
  }
  if (p.kind == FeatureKind::kSoftmax) {
    const double top = *std::max_element(result.begin(), result.end());
    double sum = 0;
    for (double u : result) sum += std::exp(u - top);
    for (double& u : result) u -= top + std::log(sum);
  }
  if (p.kind == FeatureKind::kElu) {
    for (double& u : result) u = u < 0 ? u : std::log1p(u);
  }
  for (int64_t i = 0; i < p.m; ++i) {
    if (!weight.empty()) result[i] += weight[head * p.m + i];
    if (p.kind == FeatureKind::kExp && !beta.empty()) result[i] -= beta[head] * norm;
  }
  return result;
}

inline bool is_near(const Problem& p, int64_t t, int64_t s) {
  return s < p.sinks || (p.window > 0 && t / p.window - s / p.window <= 1);
}

inline double log_sum_exp(const Array& x) {
  double top = -std::numeric_limits<double>::infinity();
  for (double e : x) top = std::max(top, e);
  if (std::isinf(top)) return top;
  double sum = 0;
  for (double e : x) sum += std::exp(e - top);
  return top + std::log(sum);
}

// Everything of one (sequence, kv head) that does not depend on the query head.
struct Keys {
  Range range;
  std::vector<Array> log_phi;  // of every key
  Array log_decay;             // of every token
  Array cumulative;            // c_t: its sum over tokens <= t of the sequence
};
inline Keys keys_of(const Problem& p, int64_t sequence, int64_t head) {
  Keys keys{range_of(p, sequence), {}, {}, {}};
  double c = 0;
  for (int64_t t = keys.range.begin; t < keys.range.end; ++t) {
    const int64_t row = (keys.range.batch * p.kv_heads + head) * p.seqlen + t;
    if (p.m > 0) {
      keys.log_phi.push_back(log_phi(p, &p.k[row * p.d], p.omega_k, p.weight_k, p.beta_k, head));
    }
    keys.log_decay.push_back(p.log_decay.empty() ? 0.0 : p.log_decay[row]);
    keys.cumulative.push_back(c += keys.log_decay.back());
  }
  return keys;
}

struct Output {
  Array out;          // (batch, heads, seqlen, dv), 0 in padding
  Array denominator;  // (batch, heads, seqlen): its natural logarithm
};

inline Output attention(const Problem& p) {
  Output result{Array(p.batch * p.heads * p.seqlen * p.dv), Array(p.batch * p.heads * p.seqlen)};
  for (int64_t n = 0; n < p.num_seqs(); ++n) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t kv_head = head / p.groups();
      const Keys keys = keys_of(p, n, kv_head);
      const int64_t length = keys.range.end - keys.range.begin;
      const int64_t q_row = (keys.range.batch * p.heads + head) * p.seqlen + keys.range.begin;
      const int64_t k_row = (keys.range.batch * p.kv_heads + kv_head) * p.seqlen + keys.range.begin;
      for (int64_t t = 0; t < length; ++t) {
        const double* q = &p.q[(q_row + t) * p.d];
        const Array b = p.m > 0 ? log_phi(p, q, p.omega_q, p.weight_q, p.beta_q, head) : Array();
        Array log_w(t + 1, -std::numeric_limits<double>::infinity());
        double decay = 0;  // c_t - c_s, summed from t back: no cancellation
        for (int64_t s = t; s >= 0; --s) {
          if (is_near(p, t, s)) {
            log_w[s] = 0;
            for (int64_t j = 0; j < p.d; ++j)
              log_w[s] += p.scale * q[j] * p.k[(k_row + s) * p.d + j];
          } else if (p.m > 0) {
            Array terms(p.m);
            for (int64_t i = 0; i < p.m; ++i) terms[i] = b[i] + keys.log_phi[s][i];
            log_w[s] = log_sum_exp(terms) + decay;
          }
          decay += keys.log_decay[s];
        }
        Array all = log_w;
        Array log_f;  // of the query, decayed back to the state's time
        if (!p.kv.empty()) {
          for (int64_t i = 0; i < p.m; ++i) {
            log_f.push_back(b[i] + keys.cumulative[t]);
            all.push_back(log_f[i] + std::log(p.z[(n * p.kv_heads + kv_head) * p.m + i]));
          }
        }
        if (p.eps > 0) all.push_back(std::log(p.eps));
        const double log_den = log_sum_exp(all);
        result.denominator[q_row + t] = log_den;
        if (std::isinf(log_den)) continue;
        const double shift = p.normalize ? log_den : 0.0;
        for (int64_t j = 0; j < p.dv; ++j) {
          double sum = 0;
          for (int64_t s = 0; s <= t; ++s) {
            sum += std::exp(log_w[s] - shift) * p.v[(k_row + s) * p.dv + j];
          }
          for (size_t i = 0; i < log_f.size(); ++i) {
            sum += std::exp(log_f[i] - shift) *
                   p.kv[((n * p.kv_heads + kv_head) * p.m + i) * p.dv + j];
          }
          result.out[(q_row + t) * p.dv + j] = sum;
        }
      }
    }
  }
  return result;
}

// The state after the last token, scaled by 2^-log_scale: (num_seqs, kv_heads, m, dv) and
// (num_seqs, kv_heads, m).
struct State {
  Array kv, z;
};
inline State final_state(const Problem& p, const Array& log_scale) {
  State state{Array(log_scale.size() * p.dv), Array(log_scale.size())};
  for (int64_t n = 0; n < p.num_seqs(); ++n) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Keys keys = keys_of(p, n, head);
      const int64_t length = keys.range.end - keys.range.begin;
      const int64_t k_row = (keys.range.batch * p.kv_heads + head) * p.seqlen + keys.range.begin;
      // With a window, only blocks before the last token's previous one are folded.
      int64_t folded = length;
      if (p.window > 0 && length > 0) {
        folded = std::max<int64_t>(0, ((length - 1) / p.window - 1) * p.window);
      }
      for (int64_t i = 0; i < p.m; ++i) {
        const int64_t feature = (n * p.kv_heads + head) * p.m + i;
        const double unit = log_scale[feature] * std::log(2.0);
        const double end = folded > 0 ? keys.cumulative[folded - 1] : 0.0;
        for (int64_t s = p.sinks; s < folded; ++s) {
          const double w = std::exp(keys.log_phi[s][i] + end - keys.cumulative[s] - unit);
          state.z[feature] += w;
          for (int64_t j = 0; j < p.dv; ++j) {
            state.kv[feature * p.dv + j] += w * p.v[(k_row + s) * p.dv + j];
          }
        }
        if (p.kv.empty()) continue;
        state.z[feature] += p.z[feature] * std::exp(end - unit);
        for (int64_t j = 0; j < p.dv; ++j) {
          state.kv[feature * p.dv + j] += p.kv[feature * p.dv + j] * std::exp(end - unit);
        }
      }
    }
  }
  return state;
}

}  // namespace dijiang::reference
