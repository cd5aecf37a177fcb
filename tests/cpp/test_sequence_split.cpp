// The forward cut into parts for more threads, against the forward in one piece.
#include "cpu/sequence_split.h"

#include <gtest/gtest.h>

#include "attention_case.h"

namespace dijiang::testing {
namespace {

// In the least helpful order that the promise allows.
void run(const LinearAttentionParams& params, int64_t threads, int64_t least_parts) {
  const cpu::SequenceSplit split(params, threads);
  ASSERT_GE(split.num_parts(), least_parts);
  for (int64_t task = split.num_state_tasks() - 1; task >= 0; --task) {
    split.run_states(task, task + 1);
  }
  const int64_t half = split.num_tasks() / 2;
  split.run(half, split.num_tasks());
  split.run(0, half);
}

// To the bit; slots that nothing was put in keep the NaN they had.
void expect_identical(const Array& got, const Array& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i])))
        << what << ", element " << i << ": got " << got[i] << ", want " << want[i];
  }
}

void expect_the_same(const Problem& problem, DType dtype, int64_t threads, int64_t least_parts,
                     double tolerance) {
  Case whole(problem, dtype), parts(problem, dtype);
  const Array want = whole.forward();
  run(parts.params(), threads, least_parts);
  const std::string what = describe(problem, dtype) + " threads " + std::to_string(threads);
  expect_close(parts.out.values(), want, tolerance, what);
  expect_close(parts.final.z.values(), whole.final.z.values(), tolerance, what + " z");
  expect_close(parts.final.kv.values(), whole.final.kv.values(), tolerance, what + " kv");
  expect_identical(parts.final.log_scale.values(), whole.final.log_scale.values(), what);
  expect_identical(parts.final.window_k.values(), whole.final.window_k.values(), what);
  expect_identical(parts.final.window_v.values(), whole.final.window_v.values(), what);
  expect_identical(parts.final.sink_v.values(), whole.final.sink_v.values(), what);
  EXPECT_EQ(parts.final.length, whole.final.length) << what;
}

TEST(SequenceSplit, EqualsOnePiece) {
  for (FeatureKind kind : {FeatureKind::kGiven, FeatureKind::kExp}) {
    for (int64_t window : {0, 48}) {
      for (bool decay : {false, true}) {
        for (bool state : {false, true}) {
          if (window > 0 && (state || kind == FeatureKind::kGiven)) continue;
          Problem p;
          p.kind = kind;
          p.kv_heads = 1;
          p.heads = 2;
          p.seqlen = 1031;  // the last part ends inside a tile
          p.window = window;
          p.sinks = window > 0 ? 3 : 0;
          p = random_problem(p, decay, state);
          expect_the_same(p, DType::kFloat64, 8, 4, 1e-12);
          expect_the_same(p, DType::kFloat32, 3, 3, 1e-5);
        }
      }
    }
  }
}

TEST(SequenceSplit, WindowAloneAndLowPrecision) {
  Problem p;
  p.m = 0;
  p.seqlen = 800;
  p.window = 16;
  p.sinks = 2;
  p = random_problem(p);
  expect_the_same(p, DType::kBFloat16, 4, 2, 1e-2);
}

TEST(SequenceSplit, SegmentsOfDifferentLengths) {
  for (int64_t window : {0, 16}) {
    Problem p;
    p.batch = 2;
    p.seqlen = 1200;
    p.window = window;
    p.sinks = window > 0 ? 1 : 0;
    p.segments = {0, 0, 1100, 0, 1100, 1100, 0, 1101, 1171, 1, 200, 1000};
    p = random_problem(p, true);
    expect_the_same(p, DType::kFloat64, 16, 2, 1e-12);
  }
}

TEST(SequenceSplit, ShortOrManyStayWhole) {
  Problem p;
  p.seqlen = 300;
  p = random_problem(p);
  Case short_one(p, DType::kFloat32);
  EXPECT_EQ(cpu::SequenceSplit(short_one.params(), 16).num_parts(), 1);
  p.seqlen = 600;
  p.batch = 8;
  p = random_problem(p);
  Case many(p, DType::kFloat32);
  EXPECT_EQ(cpu::SequenceSplit(many.params(), 2).num_parts(), 1);
  EXPECT_EQ(cpu::SequenceSplit(many.params(), 2).num_state_tasks(), 0);
  EXPECT_EQ(cpu::SequenceSplit(many.params(), 1).num_parts(), 1);
  p.batch = 0;
  p = random_problem(p);
  Case none(p, DType::kFloat32);
  EXPECT_EQ(cpu::SequenceSplit(none.params(), 4).num_tasks(), 0);
}

}  // namespace
}  // namespace dijiang::testing
