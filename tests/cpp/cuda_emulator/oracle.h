// Linear attention by its definition, in double, weight by weight: the truth for the CUDA kernels'
// tests. Sequences start empty; carried states are tested by splitting a sequence.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "dijiang/core/linear_attention.h"

namespace oracle {

using dijiang::FeatureKind;

struct Problem {
  FeatureKind kind = FeatureKind::kExp;
  int batch = 1, heads = 2, kv_heads = 1, seqlen = 100, dim = 16, dim_v = 16, features = 24;
  double scale = 0.25;
  int window = 0, sinks = 0, cache_size = 0;
  std::vector<int> cache_sizes;  // of each kv head; empty: cache_size
  bool decay = false, normalize = true, beta = true, log_weight = true;
  double eps = 0.0;
  double size = 1.0;                       // of q and k
  std::vector<std::vector<int>> segments;  // (batch, begin, end); empty: whole rows
  std::vector<double> q, k, v, log_decay;  // dense (batch, heads, seqlen, dim)
  std::vector<double> omega_q, omega_k, weight_q, weight_k, beta_q, beta_k;
  std::vector<double> grad_out;

  int slots(int kv_head) const { return cache_sizes.empty() ? cache_size : cache_sizes[kv_head]; }
  dijiang::CacheSizes cache() const {
    dijiang::CacheSizes out;
    out.most = cache_size;
    out.own = !cache_sizes.empty();
    for (size_t h = 0; h < cache_sizes.size(); ++h) {
      out.most = std::max<int64_t>(out.most, cache_sizes[h]);
      out.first[h + 1] = out.first[h] + cache_sizes[h];
    }
    return out;
  }

  void fill(unsigned seed, double (*round)(double)) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& x, int64_t count, double size, bool narrow) {
      x.resize(count);
      for (double& e : x)
        e = narrow ? round(normal(generator) * size) : float(normal(generator) * size);
    };
    if (kind == FeatureKind::kGiven) features = dim;
    draw(q, int64_t{batch} * heads * seqlen * dim, size, true);
    draw(k, int64_t{batch} * kv_heads * seqlen * dim, size, true);
    draw(v, int64_t{batch} * kv_heads * seqlen * dim_v, 1.0, true);
    draw(grad_out, int64_t{batch} * heads * seqlen * dim_v, 1.0, true);
    if (kind == FeatureKind::kGiven) {
      for (double& e : q) e = std::fabs(e);
      for (double& e : k) e = std::fabs(e);
    }
    for (int b = 0; b < batch && !segments.empty(); ++b) {
      for (int t = 0; t < seqlen; ++t) {
        bool padding = true;
        for (const auto& s : segments) padding &= !(s[0] == b && s[1] <= t && t < s[2]);
        if (!padding) continue;
        for (int h = 0; h < heads; ++h) {
          std::fill_n(q.begin() + row(h, heads, b, t) * dim, dim, NAN);
        }
        for (int h = 0; h < kv_heads; ++h) {
          std::fill_n(k.begin() + row(h, kv_heads, b, t) * dim, dim, NAN);
          std::fill_n(v.begin() + row(h, kv_heads, b, t) * dim_v, dim_v, NAN);
        }
      }
    }
    draw(log_decay, decay ? int64_t{batch} * kv_heads * seqlen : 0, 0.1, false);
    for (double& e : log_decay) e = -std::fabs(e);
    draw(omega_q, int64_t{heads} * features * dim, 1.0, false);
    draw(omega_k, int64_t{kv_heads} * features * dim, 1.0, false);
    draw(weight_q, log_weight ? heads * features : 0, 0.5, false);
    draw(weight_k, log_weight ? kv_heads * features : 0, 0.5, false);
    draw(beta_q, beta ? heads : 0, 0.3, false);
    draw(beta_k, beta ? kv_heads : 0, 0.3, false);
  }
  void resize(int dim_, int features_, int dim_v_) {
    dim = dim_;
    features = features_;
    dim_v = dim_v_;
    scale = 1.0 / std::sqrt(dim);
  }
  int64_t row(int h, int heads_, int b, int t) const {
    return (int64_t{b} * heads_ + h) * seqlen + t;
  }
  std::vector<std::vector<int>> sequences() const {
    if (!segments.empty()) return segments;
    std::vector<std::vector<int>> all;
    for (int b = 0; b < batch; ++b) all.push_back({b, 0, seqlen});
    return all;
  }
};

// Slots that fill up at once, late (past a block of sinks alone), and never; many slots.
inline std::vector<Problem> hard_key_problems() {
  std::vector<Problem> all;
  for (const auto& [window, sinks, cache_size, seqlen] : std::vector<std::array<int, 4>>{
           {8, 3, 5, 75}, {6, 8, 12, 75}, {16, 0, 90, 80}, {5, 0, 1, 60}, {70, 2, 100, 300}}) {
    Problem p;
    p.batch = 2;
    p.heads = 4;
    p.kv_heads = 2;
    p.window = window;
    p.sinks = sinks;
    p.cache_size = cache_size;
    p.seqlen = seqlen;
    p.dim = p.dim_v = 8;
    p.features = 10;
    all.push_back(p);
    if (cache_size > 1 && cache_size < 90) {  // heads apart, one of them without
      p.cache_size = 0;
      p.cache_sizes = {cache_size, cache_size % 3 == 0 ? 0 : cache_size / 2};
      if (window == 6) std::swap(p.cache_sizes[0], p.cache_sizes[1]);
      all.push_back(p);
    }
  }
  return all;
}

struct Result {
  std::vector<double> out, log_sum;  // log_sum: natural log of the denominator
  std::vector<double> kv, z;         // true final state, per sequence
  std::vector<double> grad_q, grad_k, grad_v, grad_omega_q, grad_omega_k, grad_weight_q,
      grad_weight_k, grad_beta_q, grad_beta_k, grad_log_decay;
};

// Natural log features of one row, and u (kinds other than kGiven). kGiven: the values.
inline std::vector<double> features(const Problem& p, const double* x, const double* omega,
                                    const double* weight, double beta) {
  const int m = p.features;
  if (p.kind == FeatureKind::kGiven) return {x, x + m};
  std::vector<double> y(m);
  double square = 0.0, top = -INFINITY, sum = 0.0;
  for (int j = 0; j < p.dim; ++j) square += p.scale * x[j] * x[j];
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < p.dim; ++j) y[i] += std::sqrt(p.scale) * omega[i * p.dim + j] * x[j];
    top = std::fmax(top, y[i]);
  }
  for (int i = 0; i < m; ++i) sum += std::exp(y[i] - top);
  for (int i = 0; i < m; ++i) {
    if (p.kind == FeatureKind::kExp) y[i] -= beta * square;
    if (p.kind == FeatureKind::kSoftmax) y[i] -= top + std::log(sum);
    if (p.kind == FeatureKind::kElu) y[i] = y[i] > 0 ? std::log1p(y[i]) : y[i];
    if (weight) y[i] += weight[i];
  }
  return y;
}

// d log phi = db -> gradients of x and of the parameters. kGiven: db is the gradient of x.
inline void features_backward(const Problem& p, const double* x, const double* omega,
                              const double* weight, double beta, const std::vector<double>& y,
                              const double* db, double* dx, double* domega, double* dweight,
                              double* dbeta) {
  const int m = p.features;
  if (p.kind == FeatureKind::kGiven) {
    for (int i = 0; i < m; ++i) dx[i] += db[i];
    return;
  }
  double square = 0.0, total = 0.0;
  for (int j = 0; j < p.dim; ++j) square += p.scale * x[j] * x[j];
  for (int i = 0; i < m; ++i) total += db[i];
  for (int i = 0; i < m; ++i) {
    const double log_phi = y[i] - (weight ? weight[i] : 0.0);
    double du = db[i];
    if (p.kind == FeatureKind::kSoftmax) du -= std::exp(log_phi) * total;
    if (p.kind == FeatureKind::kElu && log_phi > 0) du *= std::exp(-log_phi);
    if (weight) dweight[i] += db[i];
    for (int j = 0; j < p.dim; ++j) {
      dx[j] += std::sqrt(p.scale) * omega[i * p.dim + j] * du;
      domega[i * p.dim + j] += std::sqrt(p.scale) * x[j] * du;
    }
  }
  if (p.kind == FeatureKind::kExp && dbeta) {
    for (int j = 0; j < p.dim; ++j) dx[j] -= 2.0 * beta * p.scale * x[j] * total;
    *dbeta -= square * total;
  }
}

// The keys that one kv head keeps beyond the window, a list for every block of a sequence:
// docs/numerics.md, "Hard keys".
inline std::vector<std::vector<int>> hard_keys(const Problem& p, int batch, int begin, int length,
                                               int kv_head) {
  const int size = p.slots(kv_head);
  const int w = p.window, d = p.dim, dv = p.dim_v, group = p.heads / p.kv_heads;
  const auto key = [&](int s) { return &p.k[p.row(kv_head, p.kv_heads, batch, begin + s) * d]; };
  const auto value = [&](int s) { return &p.v[p.row(kv_head, p.kv_heads, batch, begin + s) * dv]; };
  std::vector<std::vector<int>> blocks;
  std::vector<int> held;
  std::map<int, double> carried;  // votes, by position
  for (int block = 0; block * w < length; ++block) {
    std::vector<int> all = held;
    const int leaving = (block - 2) * w;
    for (int s = std::max(leaving, p.sinks); block >= 2 && s < leaving + w; ++s) all.push_back(s);
    std::vector<double> votes;
    for (const int s : all) votes.push_back(carried.count(s) ? carried.at(s) : 0.0);
    if (block >= 2) {
      for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        for (int t = (block - 1) * w; t < block * w; ++t) {
          const double* query = &p.q[p.row(h, p.heads, batch, begin + t) * d];
          const auto score = [&](int s) {
            double sum = 0;
            for (int j = 0; j < d; ++j) sum += p.scale * query[j] * key(s)[j];
            return sum;
          };
          std::vector<int> exact = held;
          for (int s = 0; s <= t; ++s) {
            if (s < p.sinks || s >= leaving) exact.push_back(s);
          }
          double top = -INFINITY, sum = 0;
          for (const int s : exact) top = std::fmax(top, score(s));
          for (const int s : exact) sum += std::exp(score(s) - top);
          for (size_t i = 0; i < all.size(); ++i) votes[i] += std::exp(score(all[i]) - top) / sum;
        }
      }
      carried.clear();
      for (size_t i = 0; i < all.size(); ++i) carried[all[i]] = dijiang::kCarriedVotes * votes[i];
    }
    if (block >= 2 && int(all.size()) > size) {
      std::vector<double> mean_k(d), mean_v(dv), novelty;
      for (int s = 0; s < block * w; ++s) {
        for (int j = 0; j < d; ++j) mean_k[j] += key(s)[j] / (block * w);
        for (int j = 0; j < dv; ++j) mean_v[j] += value(s)[j] / (block * w);
      }
      for (const int s : all) {
        double product = 0, norm = 0, mean_norm = 0, square = 0;
        for (int j = 0; j < d; ++j) {
          product += key(s)[j] * mean_k[j];
          norm += key(s)[j] * key(s)[j];
          mean_norm += mean_k[j] * mean_k[j];
        }
        for (int j = 0; j < dv; ++j) square += std::pow(value(s)[j] - mean_v[j], 2);
        novelty.push_back(std::sqrt(square) * std::exp(-product / std::sqrt(norm * mean_norm)));
      }
      std::vector<bool> kept(all.size());
      const auto keep = [&](const std::vector<double>& scores, int wanted) {
        for (; wanted > 0; --wanted) {
          int best = -1;
          for (size_t i = 0; i < all.size(); ++i) {
            if (!kept[i] && (best < 0 || scores[i] > scores[best])) best = int(i);
          }
          kept[best] = true;
        }
      };
      const int novel = size / int(dijiang::kNovelSlots);
      keep(novelty, novel);
      keep(votes, size - novel);
      std::vector<int> entering, next;
      for (size_t i = held.size(); i < all.size(); ++i) {
        if (kept[i]) entering.push_back(all[i]);
      }
      size_t used = 0;
      for (int i = 0; i < size; ++i) {
        const bool stays = i < int(held.size()) && kept[i];
        next.push_back(stays ? held[i] : entering[used++]);
      }
      held = next;
    } else {
      held = all;
    }
    blocks.push_back(held);
  }
  return blocks;
}

inline Result run(const Problem& p, bool backward) {
  const int m = p.features, d = p.dim, dv = p.dim_v, group = p.heads / p.kv_heads;
  const auto sequences = p.sequences();
  Result r;
  r.out.assign(size_t(p.batch) * p.heads * p.seqlen * dv, 0.0);
  r.log_sum.assign(size_t(p.batch) * p.heads * p.seqlen, 0.0);
  r.kv.assign(sequences.size() * p.kv_heads * m * dv, 0.0);
  r.z.assign(sequences.size() * p.kv_heads * m, 0.0);
  r.grad_q.assign(p.q.size(), 0.0);
  r.grad_k.assign(p.k.size(), 0.0);
  r.grad_v.assign(p.v.size(), 0.0);
  r.grad_omega_q.assign(p.omega_q.size(), 0.0);
  r.grad_omega_k.assign(p.omega_k.size(), 0.0);
  r.grad_weight_q.assign(p.weight_q.size(), 0.0);
  r.grad_weight_k.assign(p.weight_k.size(), 0.0);
  r.grad_beta_q.assign(p.beta_q.size(), 0.0);
  r.grad_beta_k.assign(p.beta_k.size(), 0.0);
  r.grad_log_decay.assign(p.log_decay.size(), 0.0);
  const auto at = [](const std::vector<double>& x, size_t i) {
    return x.empty() ? nullptr : &x[i];
  };
  const auto value = [](const std::vector<double>& x, size_t i) { return x.empty() ? 0.0 : x[i]; };
  const bool given = p.kind == FeatureKind::kGiven;

  for (size_t n = 0; n < sequences.size(); ++n) {
    const int batch = sequences[n][0], begin = sequences[n][1], end = sequences[n][2];
    const int length = end - begin;
    for (int h = 0; h < p.heads; ++h) {
      const int hk = h / group;
      std::vector<double> c(length + 1, 0.0);  // c[t + 1]: decay up to t
      std::vector<std::vector<double>> a(length), b(length), db(length), da(length);
      for (int t = 0; t < length; ++t) {
        const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + t);
        const int64_t row_q = p.row(h, p.heads, batch, begin + t);
        c[t + 1] = c[t] + value(p.log_decay, row_k);
        if (m == 0) continue;
        a[t] = features(p, &p.k[row_k * d], at(p.omega_k, size_t(hk) * m * d),
                        at(p.weight_k, size_t(hk) * m), value(p.beta_k, hk));
        b[t] = features(p, &p.q[row_q * d], at(p.omega_q, size_t(h) * m * d),
                        at(p.weight_q, size_t(h) * m), value(p.beta_q, h));
        db[t].assign(m, 0.0);
        da[t].assign(m, 0.0);
      }
      std::vector<std::vector<int>> held;
      if (p.cache().most > 0) held = hard_keys(p, batch, begin, length, hk);
      const auto is_held = [&](int block, int s) {
        return !held.empty() && std::count(held[block].begin(), held[block].end(), s) > 0;
      };
      const auto is_near = [&](int t, int s) {
        return s < p.sinks || (p.window > 0 && s / p.window + 1 >= t / p.window) ||
               (p.window > 0 && is_held(t / p.window, s));
      };
      // The log of what one feature adds to a far weight.
      const auto log_far = [&](int t, int s, int i) {
        const double x = given ? std::log(b[t][i]) + std::log(a[s][i]) : b[t][i] + a[s][i];
        return x + c[t + 1] - c[s + 1];
      };
      std::vector<double> dc(length, 0.0);
      for (int t = 0; t < length; ++t) {
        const int64_t row_q = p.row(h, p.heads, batch, begin + t);
        std::vector<double> log_weight(t + 1, -INFINITY);
        double top = p.eps > 0 ? std::log(p.eps) : -INFINITY;
        for (int s = 0; s <= t; ++s) {
          const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + s);
          if (is_near(t, s)) {
            log_weight[s] = 0.0;
            for (int j = 0; j < d; ++j) {
              log_weight[s] += p.scale * p.q[row_q * d + j] * p.k[row_k * d + j];
            }
          } else if (m > 0) {
            double most = -INFINITY, sum = 0.0;
            for (int i = 0; i < m; ++i) most = std::fmax(most, log_far(t, s, i));
            if (most > -INFINITY) {
              for (int i = 0; i < m; ++i) sum += std::exp(log_far(t, s, i) - most);
              log_weight[s] = most + std::log(sum);
            }
          }
          top = std::fmax(top, log_weight[s]);
        }
        double sum = p.eps > 0 ? std::exp(std::log(p.eps) - top) : 0.0;
        for (int s = 0; s <= t; ++s) {
          if (log_weight[s] > -INFINITY) sum += std::exp(log_weight[s] - top);
        }
        const double log_sum = top > -INFINITY ? top + std::log(sum) : INFINITY;
        r.log_sum[row_q] = log_sum;
        const double norm = p.normalize ? log_sum : 0.0;
        double* out = &r.out[row_q * dv];
        for (int s = 0; s <= t; ++s) {
          const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + s);
          if (log_weight[s] == -INFINITY) continue;
          const double weight = std::exp(log_weight[s] - norm);
          for (int j = 0; j < dv; ++j) out[j] += weight * p.v[row_k * dv + j];
        }
        if (!backward) continue;
        const double* grad = &p.grad_out[row_q * dv];
        double delta = 0.0;
        for (int j = 0; j < dv && p.normalize; ++j) delta += grad[j] * out[j];
        for (int s = 0; s <= t; ++s) {
          const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + s);
          double g = -delta;
          const double weight = log_weight[s] == -INFINITY ? 0.0 : std::exp(log_weight[s] - norm);
          for (int j = 0; j < dv; ++j) {
            g += grad[j] * p.v[row_k * dv + j];
            r.grad_v[row_k * dv + j] += weight * grad[j];
          }
          if (is_near(t, s)) {
            for (int j = 0; j < d; ++j) {
              r.grad_q[row_q * d + j] += p.scale * weight * g * p.k[row_k * d + j];
              r.grad_k[row_k * d + j] += p.scale * weight * g * p.q[row_q * d + j];
            }
            continue;
          }
          dc[t] += weight * g;
          dc[s] -= weight * g;
          for (int i = 0; i < m; ++i) {
            const double decay = c[t + 1] - c[s + 1] - norm;
            if (norm == INFINITY) continue;
            db[t][i] += g * (given ? a[s][i] * std::exp(decay) : std::exp(log_far(t, s, i) - norm));
            da[s][i] += g * (given ? b[t][i] * std::exp(decay) : std::exp(log_far(t, s, i) - norm));
          }
        }
      }
      if (m > 0 && h % group == 0) {  // the final state
        const int last = length - 1;
        const int fold_end = p.window == 0 ? length : std::max(last / p.window - 1, 0) * p.window;
        for (int s = p.sinks; s < fold_end; ++s) {
          if (is_held(last / std::max(p.window, 1), s)) continue;
          const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + s);
          for (int i = 0; i < m; ++i) {
            const double phi =
                (given ? a[s][i] : std::exp(a[s][i])) * std::exp(c[fold_end] - c[s + 1]);
            const size_t cell = (n * p.kv_heads + hk) * m + i;
            r.z[cell] += phi;
            for (int j = 0; j < dv; ++j) r.kv[cell * dv + j] += phi * p.v[row_k * dv + j];
          }
        }
      }
      if (!backward) continue;
      double total = 0.0;
      for (int t = length - 1; t >= 0; --t) {
        const int64_t row_k = p.row(hk, p.kv_heads, batch, begin + t);
        const int64_t row_q = p.row(h, p.heads, batch, begin + t);
        total += dc[t];
        if (p.decay) r.grad_log_decay[row_k] += total;
        if (m == 0) continue;
        const auto grad_at = [](std::vector<double>& x, size_t i) {
          return x.empty() ? nullptr : &x[i];
        };
        features_backward(p, &p.q[row_q * d], at(p.omega_q, size_t(h) * m * d),
                          at(p.weight_q, size_t(h) * m), value(p.beta_q, h), b[t], db[t].data(),
                          &r.grad_q[row_q * d], grad_at(r.grad_omega_q, size_t(h) * m * d),
                          grad_at(r.grad_weight_q, size_t(h) * m), grad_at(r.grad_beta_q, h));
        features_backward(p, &p.k[row_k * d], at(p.omega_k, size_t(hk) * m * d),
                          at(p.weight_k, size_t(hk) * m), value(p.beta_k, hk), a[t], da[t].data(),
                          &r.grad_k[row_k * d], grad_at(r.grad_omega_k, size_t(hk) * m * d),
                          grad_at(r.grad_weight_k, size_t(hk) * m), grad_at(r.grad_beta_k, hk));
      }
    }
  }
  return r;
}

}  // namespace oracle
