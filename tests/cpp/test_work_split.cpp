// Attention cut into shares for more threads, against the same in whole tasks.
#include "cpu/work_split.h"

#include <gtest/gtest.h>

#include "attention_case.h"

namespace dijiang::testing {
namespace {

// Any order will do.
void run_forward(const LinearAttentionParams& params, int64_t threads, int64_t least_pieces) {
  const auto shares = cpu::split_forward(params, threads);
  ASSERT_GE(static_cast<int64_t>(shares.pieces.size()), least_pieces);
  ASSERT_LE(shares.count(), threads);
  for (int64_t i = static_cast<int64_t>(shares.pieces.size()) - 1; i >= 0; --i) {
    cpu::linear_attention_forward(params, shares.pieces, i, i + 1);
  }
}

// To the bit; slots that nothing was put in keep the NaN they had.
void expect_identical(const Array& got, const Array& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i])))
        << what << ", element " << i << ": got " << got[i] << ", want " << want[i];
  }
}

void expect_states_identical(const State& got, const State& want, const std::string& what) {
  expect_identical(got.kv.values(), want.kv.values(), what + " kv");
  expect_identical(got.z.values(), want.z.values(), what + " z");
  expect_identical(got.log_scale.values(), want.log_scale.values(), what + " log_scale");
  expect_identical(got.window_k.values(), want.window_k.values(), what + " window_k");
  expect_identical(got.window_v.values(), want.window_v.values(), what + " window_v");
  expect_identical(got.window_decay.values(), want.window_decay.values(), what + " window_decay");
  expect_identical(got.sink_k.values(), want.sink_k.values(), what + " sink_k");
  expect_identical(got.sink_v.values(), want.sink_v.values(), what + " sink_v");
  EXPECT_EQ(got.length, want.length) << what;
}

// The cuts change no bit of what belongs to a token; what is summed over tokens is summed in
// another order.
void expect_the_same(const Problem& problem, DType dtype, int64_t threads, int64_t least_pieces,
                     bool grad_state = false) {
  const std::string what = describe(problem, dtype) + " threads " + std::to_string(threads);
  Case whole(problem, dtype), cut(problem, dtype);
  const Array want = whole.forward();
  run_forward(cut.params(), threads, least_pieces);
  expect_identical(cut.out.values(), want, what);
  expect_identical(cut.row_scale.values(), whole.row_scale.values(), what + " row_scale");
  expect_states_identical(cut.final, whole.final, what);

  const Array grad = random_problem(problem, false, false, 7).v;
  Array grad_out(want.size());
  for (size_t i = 0; i < grad_out.size(); ++i) grad_out[i] = grad[i % grad.size()];
  Array grad_kv, grad_z;
  if (grad_state) {
    grad_kv = Array(whole.final.kv.size(), 0.01);
    grad_z = Array(whole.final.z.size(), -0.02);
  }
  whole.backward(grad_out, grad_kv, grad_z, 1);
  cut.backward(grad_out, grad_kv, grad_z, threads);
  EXPECT_GT(cut.num_pieces, whole.num_pieces) << what;
  const bool has_sinks = problem.sinks > 0;
  // Sums of that many terms.
  const double sums = static_cast<double>(problem.seqlen) * unit_roundoff(acc_of(dtype));
  const double sinks = 2 * unit_roundoff(dtype) + sums;
  expect_identical(cut.dq.values(), whole.dq.values(), what + " dq");
  if (has_sinks) {
    expect_close(cut.dk.values(), whole.dk.values(), sinks, what + " dk");
    expect_close(cut.dv.values(), whole.dv.values(), sinks, what + " dv");
  } else {
    expect_identical(cut.dk.values(), whole.dk.values(), what + " dk");
    expect_identical(cut.dv.values(), whole.dv.values(), what + " dv");
  }
  expect_identical(cut.dlog_decay.values(), whole.dlog_decay.values(), what + " dlog_decay");
  expect_identical(cut.dkv.values(), whole.dkv.values(), what + " dkv");
  expect_identical(cut.dz.values(), whole.dz.values(), what + " dz");
  expect_close(cut.domega_q.values(), whole.domega_q.values(), sums, what + " domega_q");
  expect_close(cut.domega_k.values(), whole.domega_k.values(), sums, what + " domega_k");
  expect_close(cut.dweight_q.values(), whole.dweight_q.values(), sums, what + " dweight_q");
  expect_close(cut.dweight_k.values(), whole.dweight_k.values(), sums, what + " dweight_k");
  expect_close(cut.dbeta_q.values(), whole.dbeta_q.values(), sums, what + " dbeta_q");
  expect_close(cut.dbeta_k.values(), whole.dbeta_k.values(), sums, what + " dbeta_k");
}

TEST(WorkSplit, ChangesNoBit) {
  for (FeatureKind kind : {FeatureKind::kGiven, FeatureKind::kExp, FeatureKind::kSoftmax}) {
    for (int64_t window : {0, 48, 160}) {
      for (bool decay : {false, true}) {
        for (bool state : {false, true}) {
          if (window > 0 && (state || kind == FeatureKind::kGiven)) continue;
          Problem p;
          p.kind = kind;
          p.kv_heads = 1;
          p.heads = 2;
          p.d = 60;
          p.dv = 52;
          p.m = 72;
          p.seqlen = 1031;  // the last piece ends inside a tile
          p.window = window;
          p.sinks = window > 0 ? 3 : 0;
          p = random_problem(p, decay, state);
          expect_the_same(p, DType::kFloat64, 8, 3, window == 0);
          expect_the_same(p, DType::kFloat32, 3, 2, window == 0);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(WorkSplit, WindowAloneAndLowPrecision) {
  Problem p;
  p.m = 0;
  p.d = p.dv = 64;
  p.seqlen = 2048;
  p.window = 64;
  p.sinks = 2;
  p = random_problem(p);
  expect_the_same(p, DType::kBFloat16, 4, 3);
}

TEST(WorkSplit, SegmentsOfDifferentLengths) {
  for (int64_t window : {0, 16}) {
    Problem p;
    p.batch = 2;
    p.d = p.dv = p.m = 32;
    p.seqlen = 1200;
    p.window = window;
    p.sinks = window > 0 ? 1 : 0;
    p.segments = {0, 0, 1100, 0, 1100, 1100, 0, 1101, 1171, 1, 200, 1000};
    p = random_problem(p, true);
    expect_the_same(p, DType::kFloat64, 16, 5);
  }
}

// Every token of every task is in exactly one piece of each pass, on the threads asked for.
template <typename Piece>
void expect_all_tokens(const std::vector<Piece>& pieces, int64_t tasks, int64_t seqlen) {
  std::vector<int64_t> covered(tasks);
  for (const Piece& piece : pieces) {
    EXPECT_EQ(piece.begin % 64, 0);
    for (const Piece& other : pieces) {
      if (&other == &piece || other.task != piece.task) continue;
      EXPECT_TRUE(other.end <= piece.begin || other.begin >= piece.end);
    }
    covered[piece.task] += std::min(piece.end, seqlen) - piece.begin;
  }
  for (int64_t tokens : covered) EXPECT_EQ(tokens, seqlen);
}

TEST(WorkSplit, GivesEveryThreadItsShare) {
  Problem p;
  p.d = p.dv = p.m = 64;
  p.heads = 9;
  p.kv_heads = 3;
  p.seqlen = 4096;
  p = random_problem(p);
  Case c(p, DType::kFloat32);
  for (int64_t threads : {2, 3, 5, 16}) {
    const auto forward = cpu::split_forward(c.params(), threads);
    EXPECT_LE(forward.count(), threads);
    EXPECT_GE(forward.count(), threads - threads / 8);
    expect_all_tokens(forward.pieces, 3, p.seqlen);
    LinearAttentionBackwardParams params;
    params.forward = c.params();
    const auto backward = cpu::split_backward(params, threads);
    EXPECT_LE(backward.count(), threads);
    EXPECT_GE(backward.count(), threads - threads / 8);
    for (cpu::BackwardHalf half : {cpu::BackwardHalf::kQueries, cpu::BackwardHalf::kKeys}) {
      std::vector<cpu::BackwardPiece> pieces;
      for (const auto& piece : backward.pieces) {
        if (piece.half == half) pieces.push_back(piece);
      }
      expect_all_tokens(pieces, 3, p.seqlen);
    }
  }
}

TEST(WorkSplit, ShortOnesStayWhole) {
  Problem p;
  p.seqlen = 200;
  p = random_problem(p);
  Case short_one(p, DType::kFloat32);
  EXPECT_EQ(cpu::split_forward(short_one.params(), 16).pieces.size(), size_t(p.kv_heads));
  p.seqlen = 2000;
  p = random_problem(p);
  Case in_place(p, DType::kFloat32);
  LinearAttentionParams params = in_place.params();
  params.initial = params.final;  // a piece would write what another has to read
  EXPECT_EQ(cpu::split_forward(params, 16).pieces.size(), size_t(p.kv_heads));
  p.batch = 0;
  p = random_problem(p);
  Case none(p, DType::kFloat32);
  EXPECT_EQ(cpu::split_forward(none.params(), 4).count(), 0);
}

}  // namespace
}  // namespace dijiang::testing
