// Features given by the frequencies of rows of the DCT, against the same with the matrix.
#include <gtest/gtest.h>

#include "attention_case.h"
#include "dijiang/core/feature_map.h"

namespace dijiang::testing {
namespace {

double dct_row(int64_t n, int64_t k, int64_t j) {
  const double scale = std::sqrt((k == 0 ? 1.0 : 2.0) / static_cast<double>(n));
  return scale * std::cos(M_PI * (2.0 * j + 1) * k / (2.0 * n));
}

Array matrix_of(const Array& t, int64_t m, int64_t d) {
  Array omega(t.size() * d);
  for (size_t i = 0; i < t.size(); ++i) {
    for (int64_t j = 0; j < d; ++j) {
      omega[i * d + j] = t[i] * dct_row(d, static_cast<int64_t>(i) % m % d, j);
    }
  }
  return omega;
}
// d t from d omega.
Array frequencies_of(const Array& domega, int64_t m, int64_t d) {
  Array t(domega.size() / d);
  for (size_t i = 0; i < t.size(); ++i) {
    for (int64_t j = 0; j < d; ++j) {
      t[i] += domega[i * d + j] * dct_row(d, static_cast<int64_t>(i) % m % d, j);
    }
  }
  return t;
}

Array normal(size_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution;
  Array x(count);
  for (double& e : x) e = distribution(generator);
  return x;
}

// The second half of each head's frequencies becomes the first half's negative.
void pair_up(Array& t, int64_t m) {
  for (size_t i = 0; i < t.size(); ++i) {
    const size_t at = i % m;
    if (at >= size_t(m / 2)) t[i] = -t[i - m / 2];
  }
}

struct Shape {
  int64_t d, m, window;
  bool paired;
};

TEST(DctFeatures, EqualTheMatrix) {
  // Blocks cut short, several blocks, lengths of every method, blocks that end inside a vector.
  const Shape shapes[] = {{64, 64, 0, false}, {32, 64, 0, true},   {64, 128, 16, true},
                          {16, 8, 0, false},  {12, 24, 0, true},   {12, 16, 8, false},
                          {20, 50, 0, false}, {100, 37, 0, false}, {1, 5, 0, false}};
  for (const Shape& shape : shapes) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32}) {
      Problem p;
      p.kind = FeatureKind::kExp;
      p.batch = 2;
      p.heads = 4;
      p.kv_heads = 2;
      p.seqlen = 75;
      p.d = shape.d;
      p.dv = 10;
      p.m = shape.m;
      p.window = shape.window;
      p.sinks = shape.window > 0 ? 2 : 0;
      p = random_problem(p, true);
      Array tq = normal(p.heads * p.m, 3), tk = normal(p.kv_heads * p.m, 4);
      if (shape.paired) {
        pair_up(tq, p.m);
        pair_up(tk, p.m);
      }
      p.omega_q = matrix_of(tq, p.m, p.d);
      p.omega_k = matrix_of(tk, p.m, p.d);
      Case want(p, DType::kFloat64);
      Case got(p, dtype);
      got.dct = true;
      got.omega_q = Tensor(acc_of(dtype), tq);
      got.omega_k = Tensor(acc_of(dtype), tk);
      const double tolerance = dtype == DType::kFloat64 ? 1e-11 : 2e-4;
      const std::string what = describe(p, dtype) + " d " + std::to_string(p.d);
      want.forward();
      got.forward();
      expect_close(got.out.values(), want.out.values(), tolerance, what);
      const Array grad = normal(want.out.size(), 5);
      want.backward(grad);
      got.backward(grad);
      expect_close(got.dq.values(), want.dq.values(), tolerance, what + " dq");
      expect_close(got.dk.values(), want.dk.values(), tolerance, what + " dk");
      expect_close(got.domega_q.values(), frequencies_of(want.domega_q.values(), p.m, p.d),
                   tolerance, what + " dt_q");
      expect_close(got.domega_k.values(), frequencies_of(want.domega_k.values(), p.m, p.d),
                   tolerance, what + " dt_k");
      expect_close(got.dweight_k.values(), want.dweight_k.values(), tolerance, what + " dweight");
      expect_close(got.dbeta_k.values(), want.dbeta_k.values(), tolerance, what + " dbeta");
      if (HasFatalFailure()) return;
    }
  }
}

TEST(DctFeatures, MapAlone) {
  for (const auto& [d, m] : {std::pair<int64_t, int64_t>{64, 64}, {24, 60}, {7, 3}}) {
    const int64_t heads = 2, seqlen = 70;
    const Array x = normal(heads * seqlen * d, 1), t = normal(heads * m, 2);
    const Array grad = normal(heads * seqlen * m, 6);
    const auto run = [&](bool dct, Array& out, Array& dx, Array& domega) {
      const Array omega = dct ? t : matrix_of(t, m, d);
      const Tensor tx(DType::kFloat64, x), to(DType::kFloat64, omega), tg(DType::kFloat64, grad);
      Tensor y(DType::kFloat64, grad.size()), gx(DType::kFloat64, x.size());
      Tensor go(DType::kFloat64, omega.size());
      FeatureMapBackwardParams b;
      FeatureMapParams& p = b.forward;
      p.dtype = DType::kFloat64;
      p.batch = 1;
      p.num_heads = heads;
      p.seqlen = seqlen;
      p.headdim = d;
      p.num_features = m;
      p.x = view_of(tx, heads, seqlen, d);
      p.feature.omega = to.data();
      p.feature.dct = dct;
      p.scale = 0.3;
      p.log = true;
      p.out = y.data();
      cpu::feature_map_forward(p, 0, cpu::feature_map_num_tasks(p));
      b.grad_out = view_of(tg, heads, seqlen, m);
      b.grad_x = gx.data();
      b.grad.omega = go.data();
      std::vector<char> workspace(cpu::feature_map_backward_workspace(b));
      b.workspace = workspace.data();
      cpu::feature_map_backward(b, 0, cpu::feature_map_num_tasks(p));
      cpu::feature_map_backward_finish(b);
      out = y.values();
      dx = gx.values();
      domega = dct ? go.values() : frequencies_of(go.values(), m, d);
    };
    Array got[3], want[3];
    run(true, got[0], got[1], got[2]);
    run(false, want[0], want[1], want[2]);
    const char* names[] = {"log phi", "dx", "dt"};
    for (int i = 0; i < 3; ++i) expect_close(got[i], want[i], 1e-12, names[i]);
  }
}

}  // namespace
}  // namespace dijiang::testing
