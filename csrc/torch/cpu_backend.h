// The CPU kernels over torch's thread pool: tasks are independent, each thread takes a range.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/sequence.h"
#include "cpu/work_split.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/feature_map.h"
#include "dijiang/core/linear_attention.h"
#include "torch/tensor.h"

namespace dijiang::binding {

struct CpuBackend {
  static constexpr bool kShortOmega = true;

  static void dct(const DctParams& p, const Tensor&) {
    const int64_t rows = p.batch * p.heads * p.seqlen;
    // Rows are short: a thread is worth waking for some tens of thousands of elements.
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.n));
    torch::stable::parallel_for(0, rows, grain,
                                [&](int64_t begin, int64_t end) { cpu::dct(p, begin, end); });
  }

  static void feature_map_forward(const FeatureMapParams& p, const Tensor&) {
    over_tasks(cpu::feature_map_num_tasks(p),
               [&](int64_t begin, int64_t end) { cpu::feature_map_forward(p, begin, end); });
  }

  static void feature_map_backward(FeatureMapBackwardParams& p, const Tensor& like) {
    const Tensor workspace = new_workspace(like, cpu::feature_map_backward_workspace(p));
    p.workspace = data_of(workspace);
    over_tasks(cpu::feature_map_num_tasks(p.forward),
               [&](int64_t begin, int64_t end) { cpu::feature_map_backward(p, begin, end); });
    cpu::feature_map_backward_finish(p);
  }

  static void attention_forward(const LinearAttentionParams& p, const Tensor&) {
    const auto shares = cpu::split_forward(p, torch::stable::get_num_threads());
    over_tasks(shares.count(), [&](int64_t begin, int64_t end) {
      cpu::linear_attention_forward(p, shares.pieces, shares.first[begin], shares.first[end]);
    });
  }

  static void attention_backward(LinearAttentionBackwardParams& p, const Tensor& like) {
    const auto shares = cpu::split_backward(p, torch::stable::get_num_threads());
    const Tensor workspace =
        new_workspace(like, cpu::linear_attention_backward_workspace(p, shares.pieces));
    p.workspace = data_of(workspace);
    over_tasks(shares.count(), [&](int64_t begin, int64_t end) {
      cpu::linear_attention_backward(p, shares.pieces, shares.first[begin], shares.first[end]);
    });
    cpu::linear_attention_backward_finish(p, shares.pieces);
  }

  static void attention_update(const LinearAttentionParams& p, const Tensor&) {
    over_tasks(cpu::linear_attention_num_tasks(p),
               [&](int64_t begin, int64_t end) { cpu::linear_attention_update(p, begin, end); });
    cpu::linear_attention_update_finish(p);
  }

  // Values of segments: rows of (batch index, begin, end), in bounds and free of overlap; ordered:
  // in the order of memory too.
  static void check_segments(const Tensor& segments, int64_t batch, int64_t seqlen, bool ordered) {
    const auto* rows = static_cast<const int32_t*>(segments.const_data_ptr());
    std::vector<int32_t> end_of_row(batch, 0);
    int32_t last_row = 0;
    for (int64_t n = 0; n < segments.size(0); ++n) {
      const int32_t row = rows[3 * n], begin = rows[3 * n + 1], end = rows[3 * n + 2];
      check(row >= 0 && row < batch && begin >= 0 && begin <= end && end <= seqlen, "sequence ", n,
            " is tokens [", begin, ", ", end, ") of row ", row, ", which must lie inside ", batch,
            " rows of ", seqlen, " tokens");
      check(begin >= end_of_row[row], "sequence ", n, " begins at token ", begin,
            ", before the sequence ahead of it ends at ", end_of_row[row]);
      end_of_row[row] = end;
      check(!ordered || row >= last_row, "sequence ", n, " lies in row ", row,
            ", before the sequence ahead of it: hard keys want sequences in order");
      last_row = row;
    }
  }

  // Every block's hard keys are those of the block before, each in its slot, but for new ones from
  // the block that leaves the window in the place of some and in slots not filled yet.
  static void check_hard_keys(const LinearAttentionParams& p) {
    const int64_t most = p.cache.most, w = p.window;
    for (int64_t task = 0; task < cpu::linear_attention_num_tasks(p); ++task) {
      const cpu::Sequence tokens(p, task);
      const int64_t head = task % p.num_kv_heads, position = tokens.first_position(p);
      const int64_t first = position / w;
      const int64_t row = p.cache_row(tokens.index, tokens.batch * p.seqlen + tokens.begin);
      const int32_t* keys = p.given + (head * p.cache_rows() + row) * most;
      const int64_t c = p.cache.of(head);
      std::vector<int64_t> before(most, -1);
      if (p.initial.cache_position) {
        std::copy_n(p.initial.cache_position + p.cache.slot(tokens.index, head, p.num_kv_heads), c,
                    before.begin());
      }
      for (int64_t block = first; block * w < position + tokens.length(); ++block, keys += most) {
        const int64_t leaving = block >= 2 && block * w >= position ? (block - 2) * w : -w;
        std::vector<bool> entered(w);
        for (int64_t i = 0; i < most; ++i) {
          const int64_t key = keys[i];
          const bool leaves =
              i < c && leaving >= 0 && key >= std::max(leaving, p.sinks) && key < leaving + w;
          const bool enters = leaves && !entered[key - leaving] && (i == 0 || keys[i - 1] >= 0);
          check(
              key == before[i] || enters, "hard_keys of kv head ", head, ", sequence ",
              tokens.index, ", block ", block, ": slot ", i, " must hold position ", before[i],
              " as before, or a key of the block that leaves the window, once, with no empty slot "
              "before it; got ",
              key);
          if (leaves) entered[key - leaving] = true;
          before[i] = key;
        }
      }
    }
  }

 private:
  template <class F>
  static void over_tasks(int64_t num_tasks, const F& run) {
    torch::stable::parallel_for(0, num_tasks, 1, run);
  }
};

}  // namespace dijiang::binding
