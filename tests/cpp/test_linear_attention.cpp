#include "dijiang/core/linear_attention.h"

#include <gtest/gtest.h>

#include <string>

#include "attention_case.h"

namespace dijiang::testing {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr FeatureKind kKinds[] = {FeatureKind::kGiven, FeatureKind::kExp, FeatureKind::kSoftmax,
                                  FeatureKind::kElu};

// Rounding of the output, and of float sums with exponents of a few tens.
double tolerance_of(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-12 : 2 * unit_roundoff(dtype) + 4e-6;
}

// Every combination of the forward's switches at small odd sizes.
template <typename Body>
void for_each_problem(Body&& body) {
  int seed = 0;
  for (FeatureKind kind : kKinds) {
    for (int64_t window : {0, 1, 5, 8}) {
      for (int64_t sinks : {0, 3}) {
        if (kind == FeatureKind::kGiven && (window > 0 || sinks > 0)) continue;
        for (bool decay : {false, true}) {
          for (int64_t groups : {1, 3}) {
            for (int64_t seqlen : {1, 7, 29, 131}) {
              for (bool normalize : {true, false}) {
                Problem p;
                p.kind = kind;
                p.batch = 2;
                p.kv_heads = 2;
                p.heads = 2 * groups;
                p.seqlen = seqlen;
                p.window = window;
                p.sinks = sinks;
                p.normalize = normalize;
                p.scale = 0.5;
                const bool state = window == 0 && sinks == 0 && seqlen % 2 == 1;
                body(random_problem(p, decay, state, ++seed));
              }
            }
          }
        }
      }
    }
  }
}

TEST(LinearAttentionForward, EqualsTheDefinition) {
  for_each_problem([](const Problem& problem) {
    for (DType dtype : kDTypes) {
      Case c(problem, dtype);
      expect_close(c.forward(), reference::attention(c.p).out, tolerance_of(dtype),
                   describe(c.p, dtype), dtype);
      if (::testing::Test::HasFatalFailure()) return;
    }
  });
}

// Tokens [begin, end) of a problem.
Problem slice(const Problem& p, int64_t begin, int64_t end) {
  Problem part = p;
  part.seqlen = end - begin;
  const auto cut = [&](const Array& x, int64_t heads, int64_t dim) {
    Array y;
    for (int64_t row = 0; !x.empty() && row < p.batch * heads; ++row) {
      y.insert(y.end(), x.begin() + (row * p.seqlen + begin) * dim,
               x.begin() + (row * p.seqlen + end) * dim);
    }
    return y;
  };
  part.q = cut(p.q, p.heads, p.d);
  part.k = cut(p.k, p.kv_heads, p.d);
  part.v = cut(p.v, p.kv_heads, p.dv);
  part.log_decay = cut(p.log_decay, p.kv_heads, 1);
  return part;
}

// Writes the rows of a piece that begins at token `begin` into the whole.
void paste(const Problem& part, const Array& piece, int64_t begin, int64_t seqlen, Array& whole) {
  whole.resize(part.batch * part.heads * seqlen * part.dv);
  for (int64_t row = 0; row < part.batch * part.heads; ++row) {
    std::copy_n(piece.begin() + row * part.seqlen * part.dv, part.seqlen * part.dv,
                whole.begin() + (row * seqlen + begin) * part.dv);
  }
}

// kv 2^log_scale and z 2^log_scale relative to the reference's scale `unit`.
void expect_states_equal(State& got, State& want, double tolerance, const std::string& what) {
  const Array scale = want.log_scale.values();
  const auto relative = [&](const State& state, const Tensor& x) {
    Array y = x.values();
    const Array own = state.log_scale.values();
    const size_t per = y.size() / own.size();
    for (size_t i = 0; i < y.size(); ++i) y[i] *= std::exp2(own[i / per] - scale[i / per]);
    return y;
  };
  if (scale.empty()) return;
  expect_close(relative(got, got.z), want.z.values(), tolerance, what + " z");
  expect_close(relative(got, got.kv), want.kv.values(), tolerance, what + " kv");
  EXPECT_EQ(got.length, want.length) << what;
}

TEST(LinearAttentionForward, FinalStateEqualsTheDefinition) {
  for_each_problem([](const Problem& problem) {
    if (problem.heads != problem.kv_heads || !problem.normalize) return;
    for (DType dtype : {DType::kFloat64, DType::kFloat32}) {
      Case c(problem, dtype);
      c.forward();
      const reference::State want = reference::final_state(c.p, c.final.log_scale.values());
      const std::string what = describe(c.p, dtype);
      expect_close(c.final.kv.values(), want.kv, tolerance_of(dtype), what + " kv");
      expect_close(c.final.z.values(), want.z, tolerance_of(dtype), what + " z");
      for (int64_t length : c.final.length) EXPECT_EQ(length, problem.seqlen);
    }
  });
}

// A sequence cut at every place, in pieces of `step` after it, each from the state of the last.
TEST(LinearAttentionForward, SplitAnywhereEqualsTheWhole) {
  for_each_problem([](const Problem& problem) {
    if (problem.seqlen != 29 || problem.heads != problem.kv_heads) return;
    for (DType dtype : {DType::kFloat64, DType::kBFloat16}) {
      Case whole(problem, dtype);
      const Array want = whole.forward();
      for (int64_t cut = 0; cut <= problem.seqlen; ++cut) {
        for (int64_t step : {1, 3, 29}) {
          if (step < 29 && cut % 7 != 1) continue;
          Array got;
          State state = whole.initial;
          for (int64_t begin = 0; begin <= problem.seqlen;) {
            const int64_t end = begin < cut ? cut : std::min(begin + step, problem.seqlen);
            Case part(slice(whole.p, begin, end), dtype);
            part.initial = state;
            paste(part.p, part.forward(), begin, problem.seqlen, got);
            state = part.final;
            if (begin == problem.seqlen) break;  // the last piece is empty
            begin = end;
          }
          const std::string what = describe(whole.p, dtype) + " cut " + std::to_string(cut) +
                                   " step " + std::to_string(step);
          expect_close(got, want, tolerance_of(dtype), what);
          expect_states_equal(state, whole.final, tolerance_of(dtype), what);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST(LinearAttentionUpdate, TokenByTokenEqualsTheForward) {
  for_each_problem([](const Problem& problem) {
    if (problem.seqlen != 29) return;
    for (DType dtype : kDTypes) {
      Case whole(problem, dtype);
      const Array want = whole.forward();
      for (int64_t prefill : {0, 11}) {
        Array got;
        State state = whole.p.kv.empty() ? State(whole.p, dtype) : whole.initial;
        if (prefill > 0) {
          Case first(slice(whole.p, 0, prefill), dtype);
          paste(first.p, first.forward(), 0, problem.seqlen, got);
          state = first.final;
        }
        for (int64_t t = prefill; t < problem.seqlen; ++t) {
          Case part(slice(whole.p, t, t + 1), dtype);
          part.final = state;
          const LinearAttentionParams params = part.params();
          for (int64_t task = cpu::linear_attention_num_tasks(params) - 1; task >= 0; --task) {
            cpu::linear_attention_update(params, task, task + 1);
          }
          cpu::linear_attention_update_finish(params);
          paste(part.p, part.out.values(), t, problem.seqlen, got);
          state = part.final;
        }
        const std::string what = describe(whole.p, dtype) + " prefill " + std::to_string(prefill);
        expect_close(got, want, tolerance_of(dtype), what);
        expect_states_equal(state, whole.final, tolerance_of(dtype), what);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  });
}

Array random_array(size_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution(0, 1);
  Array x(count);
  for (double& e : x) e = distribution(generator);
  return x;
}

double dot(const Array& x, const Array& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// Every gradient against central differences of the definition, at up to `samples` random places
// of each tensor. With a state the loss also holds the final state.
void check_gradients(const Problem& problem, DType dtype, double tolerance, int samples = 5) {
  Case c(problem, dtype);
  c.forward();
  const Array grad_out = Tensor(dtype, random_array(c.out.size(), 1)).values();
  Array grad_kv, grad_z;
  const bool state = !problem.kv.empty();
  if (state) {
    grad_kv = random_array(c.final.kv.size(), 2);
    grad_z = random_array(c.final.z.size(), 3);
  }
  c.backward(grad_out, grad_kv, grad_z);
  const Array log_scale = c.final.log_scale.values();
  const auto loss = [&](const Problem& p) {
    double sum = dot(reference::attention(p).out, grad_out);
    if (state) {
      const reference::State final = reference::final_state(p, log_scale);
      sum += dot(final.kv, grad_kv) + dot(final.z, grad_z);
    }
    return sum;
  };
  std::mt19937 generator(7);
  const auto check = [&](Array Problem::*member, const Tensor& gradient, const char* name) {
    const Array got = gradient.values();
    ASSERT_EQ(got.size(), (c.p.*member).size()) << name;
    if (got.empty()) return;
    Array chosen, want;
    for (int n = 0; n < samples; ++n) {
      const size_t i = n < 2 ? n * (got.size() - 1) : generator() % got.size();
      Problem p = c.p;
      const double step = 1e-5, x = (p.*member)[i];
      (p.*member)[i] = x + step;
      const double up = loss(p);
      (p.*member)[i] = x - step;
      want.push_back((up - loss(p)) / (2 * step));
      chosen.push_back(got[i]);
    }
    for (double e : got) ASSERT_TRUE(std::isfinite(e)) << name << " " << describe(c.p, dtype);
    expect_close(chosen, want, tolerance, std::string("d ") + name + ", " + describe(c.p, dtype));
  };
  check(&Problem::q, c.dq, "q");
  check(&Problem::k, c.dk, "k");
  check(&Problem::v, c.dv, "v");
  check(&Problem::omega_q, c.domega_q, "omega_q");
  check(&Problem::weight_q, c.dweight_q, "weight_q");
  check(&Problem::beta_q, c.dbeta_q, "beta_q");
  check(&Problem::omega_k, c.domega_k, "omega_k");
  check(&Problem::weight_k, c.dweight_k, "weight_k");
  check(&Problem::beta_k, c.dbeta_k, "beta_k");
  check(&Problem::log_decay, c.dlog_decay, "log_decay");
  check(&Problem::kv, c.dkv, "initial kv");
  check(&Problem::z, c.dz, "initial z");
}

TEST(LinearAttentionBackward, EqualsFiniteDifferences) {
  for_each_problem([](const Problem& problem) {
    if (problem.seqlen == 131) return;
    check_gradients(problem, DType::kFloat64, 1e-7);
  });
}

// Chunk and block boundaries far beyond one tile.
TEST(LinearAttentionBackward, EqualsFiniteDifferencesAcrossTiles) {
  for (FeatureKind kind : {FeatureKind::kGiven, FeatureKind::kExp}) {
    for (int64_t window : {0, 40, 80}) {
      if (kind == FeatureKind::kGiven && window > 0) continue;
      for (bool normalize : {true, false}) {
        Problem p;
        p.kind = kind;
        p.seqlen = 200;
        p.window = window;
        p.sinks = kind == FeatureKind::kGiven ? 0 : 2;
        p.normalize = normalize;
        p.scale = 0.5;
        const bool state = kind == FeatureKind::kGiven;
        p = random_problem(p, true, state, 5);
        for (double& e : p.log_decay) e *= 0.1;
        check_gradients(p, DType::kFloat64, 1e-7);
      }
    }
  }
}

TEST(LinearAttentionBackward, LowPrecisionIsCloseToFloat64) {
  for_each_problem([](const Problem& problem) {
    if (problem.seqlen != 29 || !problem.normalize) return;
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      Case low(problem, dtype);
      low.forward();
      const Array grad = Tensor(dtype, random_array(low.out.size(), 1)).values();
      low.backward(grad);
      Case truth(low.p, DType::kFloat64);
      truth.forward();
      truth.backward(grad);
      const std::string what = describe(low.p, dtype);
      // delta is taken from the rounded output, so that one more rounding counts.
      const double tolerance = 4 * unit_roundoff(dtype) + 2e-5;
      expect_close(low.dq.values(), truth.dq.values(), tolerance, what + " dq");
      expect_close(low.dk.values(), truth.dk.values(), tolerance, what + " dk");
      expect_close(low.dv.values(), truth.dv.values(), tolerance, what + " dv");
      expect_close(low.domega_q.values(), truth.domega_q.values(), tolerance, what + " domega_q");
      expect_close(low.domega_k.values(), truth.domega_k.values(), tolerance, what + " domega_k");
      expect_close(low.dlog_decay.values(), truth.dlog_decay.values(), tolerance, what + " decay");
    }
  });
}

// Gradients of the tokens after a cut, the state before it being given: those of the whole sequence
// when only the outputs after the cut have a gradient.
TEST(LinearAttentionBackward, FromACarriedState) {
  for_each_problem([](const Problem& problem) {
    if (problem.seqlen != 29) return;
    Case whole(problem, DType::kFloat64);
    whole.forward();
    for (int64_t cut : {2, 8, 11, 17}) {
      Array grad = random_array(whole.out.size(), 1);
      for (size_t i = 0; i < grad.size(); ++i) {
        if (static_cast<int64_t>(i) / problem.dv % problem.seqlen < cut) grad[i] = 0;
      }
      whole.backward(grad);
      Case first(slice(whole.p, 0, cut), DType::kFloat64);
      first.initial = whole.initial;
      first.forward();
      Case second(slice(whole.p, cut, problem.seqlen), DType::kFloat64);
      second.initial = first.final;
      second.forward();
      const auto after = [&](const Array& x, int64_t dim) {
        Array y;
        for (size_t i = 0; i < x.size(); ++i) {
          if (static_cast<int64_t>(i) / dim % problem.seqlen >= cut) y.push_back(x[i]);
        }
        return y;
      };
      second.backward(after(grad, problem.dv));
      const std::string what = describe(whole.p, whole.dtype) + " cut " + std::to_string(cut);
      expect_close(second.dq.values(), after(whole.dq.values(), whole.p.d), 1e-11, what + " dq");
      expect_close(second.dk.values(), after(whole.dk.values(), whole.p.d), 1e-11, what + " dk");
      expect_close(second.dv.values(), after(whole.dv.values(), whole.p.dv), 1e-11, what + " dv");
      expect_close(second.dlog_decay.values(), after(whole.dlog_decay.values(), 1), 1e-11,
                   what + " dlog_decay");
      if (::testing::Test::HasFatalFailure()) return;
    }
  });
}

TEST(LinearAttention, SegmentsAreSequencesOfTheirOwn) {
  for (FeatureKind kind : kKinds) {
    for (int64_t window : {0, 5}) {
      if (kind == FeatureKind::kGiven && window > 0) continue;
      Problem p;
      p.kind = kind;
      p.batch = 2;
      p.kv_heads = 2;
      p.heads = 4;
      p.seqlen = 90;
      p.window = window;
      p.sinks = window > 0 ? 3 : 0;
      p.segments = {0, 0, 70, 0, 70, 70, 0, 71, 90, 1, 13, 77};  // one empty, the rest padding
      p = random_problem(p, true, false, 3);
      Case c(p, DType::kFloat64);
      const Array out = c.forward();
      expect_close(out, reference::attention(c.p).out, 1e-12, describe(c.p, c.dtype));
      check_gradients(p, DType::kFloat64, 1e-7);

      // What padding holds does not matter, and its gradients stay what the caller put there: 0.
      Case other(p, DType::kFloat64);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const auto poison = [&](Tensor& x, int64_t heads, int64_t dim) {
        for (int64_t head = 0; head < heads; ++head) {
          for (int64_t t : {0, 12, 77, 89}) {
            for (int64_t j = 0; j < dim; ++j) {
              static_cast<double*>(x.data())[((heads + head) * p.seqlen + t) * dim + j] = nan;
            }
          }
        }
      };
      poison(other.q, p.heads, p.d);
      poison(other.k, p.kv_heads, p.d);
      poison(other.v, p.kv_heads, p.dv);
      EXPECT_EQ(other.forward(), out);
      c.backward(random_array(out.size(), 4));
      other.backward(random_array(out.size(), 4));
      EXPECT_EQ(other.dq.values(), c.dq.values());
      EXPECT_EQ(other.dk.values(), c.dk.values());
      EXPECT_EQ(other.dv.values(), c.dv.values());
      EXPECT_EQ(other.domega_k.values(), c.domega_k.values());
    }
  }
}

TEST(LinearAttention, ReadsAnyStrides) {
  Problem p;
  p.kind = FeatureKind::kExp;
  p.batch = 2;
  p.kv_heads = 2;
  p.heads = 4;
  p.seqlen = 37;
  p.window = 5;
  p.sinks = 2;
  p = random_problem(p, true, false, 11);
  for (DType dtype : kDTypes) {
    Case c(p, dtype);
    const Array want = c.forward();
    // q as (batch, seqlen, dim, heads); k of one head expanded; log_decay per head.
    Array turned(c.p.q.size());
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < 4; ++h) {
        for (int64_t t = 0; t < 37; ++t) {
          for (int64_t j = 0; j < p.d; ++j) {
            turned[((b * 37 + t) * p.d + j) * 4 + h] = c.p.q[((b * 4 + h) * 37 + t) * p.d + j];
          }
        }
      }
    }
    const Tensor q(dtype, turned);
    LinearAttentionParams params = c.params();
    params.q = {q.data(), 37 * p.d * 4, 1, p.d * 4, 4};
    cpu::linear_attention_forward(params, 0, 4);
    EXPECT_EQ(c.out.values(), want);

    Problem expanded = c.p;
    for (size_t i = 0; i < expanded.k.size(); ++i) {
      expanded.k[i] = c.p.k[i % (37 * p.d)];
      if (i < expanded.log_decay.size()) expanded.log_decay[i] = c.p.log_decay[i / 37 % 2];
    }
    Case full(expanded, dtype);
    const Array same = full.forward();
    params = c.params();
    params.k = {c.k.data(), 0, 0, p.d, 1};
    const Tensor per_head(acc_of(dtype), Array{c.p.log_decay[0], c.p.log_decay[1]});
    params.log_decay = per_head.data();
    params.log_decay_stride_batch = 0;
    params.log_decay_stride_head = 1;
    params.log_decay_stride_seq = 0;
    cpu::linear_attention_forward(params, 0, 4);
    EXPECT_EQ(c.out.values(), same);
  }
}

TEST(LinearAttention, EpsilonAndNoFarTerm) {
  for (int64_t window : {0, 4}) {
    for (int64_t features : {0, 5}) {
      for (double eps : {0.0, 1e-3, 1e3}) {
        Problem p;
        p.seqlen = 21;
        p.m = features;
        p.window = window;
        p.sinks = 2;
        p.eps = eps;
        p = random_problem(p, true, false, 2);
        Case c(p, DType::kFloat64);
        expect_close(c.forward(), reference::attention(c.p).out, 1e-12, describe(c.p, c.dtype));
        check_gradients(p, DType::kFloat64, 1e-7);
      }
    }
  }
}

TEST(LinearAttention, RowStatisticsAreTheDenominator) {
  Problem p;
  p.kind = FeatureKind::kExp;
  p.seqlen = 100;
  p = random_problem(p, true);
  Case c(p, DType::kFloat64);
  c.forward();
  const Array scale = c.row_scale.values(), sum = c.row_sum.values();
  const Array want = reference::attention(c.p).denominator;
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(scale[i], std::round(scale[i]));
    EXPECT_GE(sum[i], 1.0);
    EXPECT_LT(sum[i], 2.0);
    EXPECT_NEAR((scale[i] + std::log2(sum[i])) * std::log(2.0), want[i], 1e-12);
  }
}

TEST(LinearAttention, WhatIsNotWantedIsNotWritten) {
  for (int64_t window : {0, 4}) {
    Problem p;
    p.seqlen = 30;
    p.window = window;
    Case c(random_problem(p, true), DType::kFloat32);
    const Array want = c.forward();
    LinearAttentionParams params = c.params();
    params.final = {};
    params.row_scale = params.row_sum = nullptr;
    cpu::linear_attention_forward(params, 0, cpu::linear_attention_num_tasks(params));
    EXPECT_EQ(c.out.values(), want);
  }
}

TEST(LinearAttention, EmptySequences) {
  for (int64_t window : {0, 4}) {
    Problem p;
    p.seqlen = 0;
    p.window = window;
    p.sinks = window / 2;
    Case c(random_problem(p, true, window == 0), DType::kFloat32);
    EXPECT_TRUE(c.forward().empty());
    if (window == 0) {
      expect_states_equal(c.final, c.initial, 1e-7, "state");
      const Array grad_kv = random_array(c.final.kv.size(), 1);
      const Array grad_z = random_array(c.final.z.size(), 2);
      c.backward({}, grad_kv, grad_z);
      expect_close(c.dkv.values(), grad_kv, 1e-7, "d kv");
      expect_close(c.dz.values(), grad_z, 1e-7, "d z");
      for (double e : c.domega_k.values()) EXPECT_EQ(e, 0.0);
    } else {
      EXPECT_EQ(c.final.length, std::vector<int64_t>{0});
    }
  }
}

// A row without any weight: zero features. Its output and its gradients are 0, not NaN; but a
// feature 0 has a gradient wherever the row has weight.
TEST(LinearAttention, ZeroFeatures) {
  Problem p;
  p.kind = FeatureKind::kGiven;
  p.heads = 1;
  p.seqlen = 80;
  p = random_problem(p, false, false, 6);
  for (int64_t i = 0; i < p.m; ++i) {
    p.q[3 * p.m + i] = 0;                                  // a query that sees nothing
    for (int64_t s = 0; s < 2; ++s) p.k[s * p.m + i] = 0;  // and keys nobody sees
  }
  p.q[70 * p.m + 2] = p.k[69 * p.m + 1] = 0;
  for (DType dtype : kDTypes) {
    Case c(p, dtype);
    const Array out = c.forward();
    for (int64_t t : {0, 1, 3}) {
      for (int64_t j = 0; j < p.dv; ++j) EXPECT_EQ(out[t * p.dv + j], 0.0);
    }
    c.backward(random_array(out.size(), 1));
    for (const Tensor* gradient : {&c.dq, &c.dk, &c.dv}) {
      for (double e : gradient->values()) ASSERT_TRUE(std::isfinite(e));
    }
    EXPECT_NE(c.dq.values()[70 * p.m + 2], 0.0);
    EXPECT_NE(c.dk.values()[69 * p.m + 1], 0.0);
  }
  // The value, one-sided: features are not negative.
  Case c(p, DType::kFloat64);
  c.forward();
  const Array grad = random_array(c.out.size(), 1);
  c.backward(grad);
  const double base = dot(reference::attention(c.p).out, grad), step = 1e-7;
  Problem moved = c.p;
  moved.k[69 * p.m + 1] = step;
  EXPECT_NEAR((dot(reference::attention(moved).out, grad) - base) / step,
              c.dk.values()[69 * p.m + 1], 1e-5);
  moved = c.p;
  moved.q[70 * p.m + 2] = step;
  EXPECT_NEAR((dot(reference::attention(moved).out, grad) - base) / step,
              c.dq.values()[70 * p.m + 2], 1e-5);
}

bool all_finite(const Tensor& x) {
  for (double e : x.values()) {
    if (!std::isfinite(e)) return false;
  }
  return true;
}

// Inputs as large as a broken model makes them: nothing overflows, no 0 / 0.
TEST(LinearAttentionExtremes, HugeInputsStayFinite) {
  for (FeatureKind kind : kKinds) {
    for (int64_t window : {0, 8}) {
      if (kind == FeatureKind::kGiven && window > 0) continue;
      for (bool decay : {false, true}) {
        for (DType dtype : kDTypes) {
          Problem p;
          p.kind = kind;
          p.heads = 3;
          p.seqlen = 150;
          p.d = p.m = 16;
          p.dv = 8;
          p.window = window;
          p.sinks = window / 4;
          p.scale = 0.25;
          p = random_problem(p, decay, false, 4);
          for (double& e : p.q) e *= 1e4;
          for (double& e : p.k) e *= 1e4;
          if (kind == FeatureKind::kGiven && dtype == DType::kFloat16) {
            for (Array* x : {&p.q, &p.k}) {
              for (double& e : *x) e = std::min(e, 65504.0);
            }
          }
          for (double& e : p.beta_q) e = 0.5;
          for (double& e : p.beta_k) e = 0.5;
          Case c(p, dtype);
          const std::string what = describe(c.p, dtype);
          const Array out = c.forward();
          ASSERT_TRUE(all_finite(c.out)) << what;
          ASSERT_TRUE(all_finite(c.final.kv) && all_finite(c.final.z)) << what;
          // An average of values lies among them.
          EXPECT_LE(largest(out), largest(c.p.v) * (1 + 4 * unit_roundoff(dtype))) << what;
          // Small enough for the gradients, about k times it, to be float16 numbers.
          Array grad = random_array(out.size(), 1);
          for (double& e : grad) e *= 0.1;
          c.backward(grad);
          // Weights of a row sum to 1, so d v sums to d out: the backward's weights are the
          // forward's.
          const Array rounded = Tensor(dtype, grad).values(), dv = c.dv.values();
          double sum = 0, want_sum = 0, magnitude = 0;
          for (double e : dv) sum += e, magnitude += std::abs(e);
          for (double e : rounded) want_sum += e, magnitude += std::abs(e);
          EXPECT_NEAR(sum, want_sum, (unit_roundoff(dtype) + 1e-5) * magnitude) << what;
          for (const Tensor* x : {&c.dq, &c.dk, &c.dv, &c.domega_q, &c.domega_k, &c.dweight_q,
                                  &c.dweight_k, &c.dbeta_q, &c.dbeta_k, &c.dlog_decay}) {
            ASSERT_TRUE(all_finite(*x)) << what;
          }
        }
      }
    }
  }
}

// Exponents far apart inside one chunk, in every order, against the definition: gradients too.
TEST(LinearAttentionExtremes, SpreadExponentsAreExact) {
  for (DType dtype : {DType::kFloat64, DType::kFloat32}) {
    // In base e: beyond the range of dtype within a few tokens.
    const double step = dtype == DType::kFloat64 ? 150 : 20;
    for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kGiven}) {
      for (int order = 0; order < 4; ++order) {
        for (bool decay : {false, true}) {
          Problem p;
          p.kind = kind;
          p.seqlen = 70;
          p.d = p.m = 3;
          p = random_problem(p, decay, kind == FeatureKind::kGiven, 8);
          std::mt19937 generator(order);
          for (int64_t s = 0; s < p.seqlen; ++s) {
            double exponent = 0;
            if (order == 0) exponent = s == 60 ? 20 * step : 0;         // one huge later key
            if (order == 1) exponent = step * (s % 8);                  // rising, again and again
            if (order == 2) exponent = -step * (s % 8);                 // falling
            if (order == 3) exponent = step * (generator() % 9 - 4.0);  // neither
            // A given feature is a number of dtype, and so is its product with a gradient.
            if (kind == FeatureKind::kGiven) exponent *= order == 0 ? 0.12 : 0.3;
            for (int64_t i = 0; i < p.d; ++i) {
              double& k = p.k[s * p.d + i];
              if (kind == FeatureKind::kGiven) {
                k *= std::exp(exponent);
              } else if (i == 0) {
                k = exponent;
              }
            }
          }
          if (kind == FeatureKind::kExp) {  // exponent of the key in every feature; queries plain
            p.beta_q.clear();
            p.beta_k.clear();
            for (int64_t i = 0; i < p.m; ++i) p.omega_k[i * p.d] = 1;
          }
          Case c(p, dtype);
          const std::string what = describe(c.p, dtype) + " order " + std::to_string(order);
          expect_close(c.forward(), reference::attention(c.p).out,
                       dtype == DType::kFloat64 ? 1e-11 : 1e-4, what);
          const Array grad = random_array(c.out.size(), 1);
          c.backward(grad);
          const auto check = [&](Array Problem::*member, const Tensor& gradient, const char* name) {
            const Array got = gradient.values();
            for (size_t i = 0; i < got.size(); i += 11) {
              Problem moved = c.p;
              double& x = (moved.*member)[i];
              const double at = x;
              const double h = 1e-5 * (kind == FeatureKind::kGiven ? std::abs(at) : 1.0);
              x = at + h;  // relative where features are far apart
              const double up = dot(reference::attention(moved).out, grad);
              x = at - h;
              const double want = (up - dot(reference::attention(moved).out, grad)) / (2 * h);
              const double unit = kind == FeatureKind::kGiven ? std::abs(at) : 1.0;
              ASSERT_NEAR(got[i] * unit, want * unit, dtype == DType::kFloat64 ? 1e-6 : 2e-4)
                  << "d " << name << " " << i << ", " << what;
            }
          };
          check(&Problem::q, c.dq, "q");
          check(&Problem::k, c.dk, "k");
          check(&Problem::v, c.dv, "v");
          check(&Problem::log_decay, c.dlog_decay, "log_decay");
        }
      }
    }
  }
}

TEST(LinearAttentionExtremes, StrongDecayKeepsTheLastKey) {
  for (FeatureKind kind : {FeatureKind::kGiven, FeatureKind::kExp}) {
    for (int64_t window : {0, 5}) {
      if (kind == FeatureKind::kGiven && window > 0) continue;
      Problem p;
      p.kind = kind;
      p.seqlen = 150;
      p.window = window;
      p = random_problem(p, true, false, 9);
      for (size_t i = 0; i < p.log_decay.size(); ++i) {
        if (i % 3 == 0) p.log_decay[i] = -1e4;
      }
      for (DType dtype : {DType::kFloat64, DType::kFloat32}) {
        Case c(p, dtype);
        expect_close(c.forward(), reference::attention(c.p).out, tolerance_of(dtype),
                     describe(c.p, dtype));
        if (dtype == DType::kFloat64) check_gradients(p, dtype, 1e-7);
      }
    }
  }
}

// A mild decay for ever, and a feature that no later key refreshes: its scale must follow.
TEST(LinearAttentionExtremes, MildDecayForLong) {
  Problem p;
  p.kind = FeatureKind::kGiven;
  p.seqlen = 3000;
  p.heads = 1;
  p = random_problem(p, true, false, 10);
  for (double& e : p.log_decay) e = -0.1;
  for (int64_t s = 1; s < p.seqlen; ++s) p.k[s * p.m] = 0;
  Case c(p, DType::kFloat32);
  c.forward();
  // Whole numbers near the logarithm of what is left.
  const double left = std::log2(c.p.k[0]) - 0.1 * 2999 / std::log(2.0);
  EXPECT_NEAR(c.final.log_scale.values()[0] + std::log2(c.final.z.values()[0]), left, 1e-3);
  EXPECT_LT(c.final.z.values()[0], 4);
  EXPECT_GT(c.final.z.values()[0], 0.1);
}

TEST(LinearAttention, TheFutureChangesNoBitOfThePast) {
  for (FeatureKind kind : kKinds) {
    for (int64_t window : {0, 5, 70}) {
      if (kind == FeatureKind::kGiven && window > 0) continue;
      for (DType dtype : kDTypes) {
        for (bool decay : {false, true}) {
          Problem p;
          p.kind = kind;
          p.seqlen = 140;
          p.d = p.m = 8;
          p.window = window;
          p.sinks = window > 0 ? 3 : 0;
          p.scale = 0.35;
          p = random_problem(p, decay, false, 12);
          for (double& e : p.log_decay) e *= 0.1;
          Case c(p, dtype);
          const Array want = c.forward();
          const Array want_scale = c.row_scale.values(), want_sum = c.row_sum.values();
          for (int64_t cut : {1, 40, 63, 64, 100}) {
            for (double factor : {-3.0, std::numeric_limits<double>::quiet_NaN()}) {
              Problem changed = c.p;
              const auto change = [&](Array& x, int64_t heads, int64_t dim) {
                for (int64_t head = 0; head < heads; ++head) {
                  for (int64_t i = cut * dim; i < p.seqlen * dim; ++i) {
                    double& e = x[head * p.seqlen * dim + i];
                    e = kind == FeatureKind::kGiven ? std::abs(e * factor) : e * factor;
                  }
                }
              };
              change(changed.q, p.heads, p.d);
              change(changed.k, p.kv_heads, p.d);
              change(changed.v, p.kv_heads, p.dv);
              Case other(changed, dtype);
              const Array got = other.forward();
              const Array scale = other.row_scale.values(), sum = other.row_sum.values();
              for (int64_t head = 0; head < p.heads; ++head) {
                for (int64_t t = 0; t < cut; ++t) {
                  const int64_t row = head * p.seqlen + t;
                  for (int64_t j = 0; j < p.dv; ++j) {
                    ASSERT_EQ(got[row * p.dv + j], want[row * p.dv + j])
                        << describe(c.p, dtype) << " cut " << cut << " row " << t << " factor "
                        << factor;
                  }
                  ASSERT_EQ(scale[row], want_scale[row]);
                  ASSERT_EQ(sum[row], want_sum[row]);
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(LinearAttentionExtremes, SixtyFourThousandTokensInBFloat16) {
  Problem p;
  p.heads = 1;
  p.seqlen = 65536;
  p.d = p.m = p.dv = 8;
  p.scale = 0.35;
  p = random_problem(p, false, false, 13);
  Case low(p, DType::kBFloat16);
  low.forward();
  Case truth(low.p, DType::kFloat64);
  truth.forward();
  expect_close(low.out.values(), truth.out.values(), 2 * unit_roundoff(DType::kBFloat16), "out");
  const Array grad = Tensor(DType::kBFloat16, random_array(low.out.size(), 1)).values();
  low.backward(grad);
  truth.backward(grad);
  const double tolerance = 4 * unit_roundoff(DType::kBFloat16);
  expect_close(low.dq.values(), truth.dq.values(), tolerance, "dq");
  expect_close(low.dk.values(), truth.dk.values(), tolerance, "dk");
  expect_close(low.dv.values(), truth.dv.values(), tolerance, "dv");
  expect_close(low.domega_k.values(), truth.domega_k.values(), tolerance, "domega_k");
}

}  // namespace
}  // namespace dijiang::testing
