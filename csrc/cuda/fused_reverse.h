// One block's walk over the queries of chunks, backwards in time, for kValueDim columns of v: it
// leaves R and rho behind each chunk, and their scales N (backward_far.h, docs/numerics.md). It is
// FoldWalk's with queries in the place of keys and gradients of the outputs in that of values;
// feature i of a row counts 2^(b_i - r) / den, decayed up to the row.
#pragma once

#include "cuda/fused_far_layout.h"
#include "cuda/fused_fold.h"

namespace dijiang::cuda {

// kSaves: whether states behind chunks are wanted, or but the last.
template <class Shape, bool kSaves>
struct ReverseWalk : StateWalk<Shape, FusedShared<Shape, false>> {
  using Base = StateWalk<Shape, FusedShared<Shape, false>>;
  using Base::a;
  using Base::first_column;
  using Base::kD;
  using Base::kM;
  using Base::kV;
  using Base::kv_head;
  using Base::lane;
  using Base::params;
  using Base::row0;
  using Base::shared;
  using typename Base::Map;
  using typename Base::Shared;
  using typename Base::T;
  static constexpr int kDeltas = Shared::bytes(0);
  static constexpr int kBytes = kDeltas + kTileRows * static_cast<int>(sizeof(float));

  const FarBackward& b;
  double decay = 0.0;  // of all chunks so far, base 2

  __device__ __forceinline__ ReverseWalk(const FarBackward& backward, char* raw, int head)
      : Base(backward.a, raw, head), b(backward) {}

  // --- steps -------------------------------------------------------------------------------------

  // A tile of a chunk's queries of one head; of a chunk without any, an empty one.
  struct Step {
    int chunk, number, count;  // count: of the chunk
    int head, size;            // size: queries
    bool decays;
    float decay;  // of the state, over all of the chunk
    // Of the lane's two rows.
    float shift[2], inverse[2], delta[2];
    const T* from;  // the row that the lane finds: of q, of lanes behind 15 of grad_out

    __device__ bool folds() const { return size > 0 || decays; }
  };
  __device__ __forceinline__ Step find_step(int chunk, int number) const {
    const LinearAttentionParams& p = params();
    const Chunk& c = a.work.chunks[chunk];
    const double* levels = a.has_decay ? levels_of(a, chunk, kv_head) : nullptr;
    const int tiles = c.query_count > kTileRows ? (c.query_count + kTileRows - 1) / kTileRows : 1;
    const int first = number % tiles * kTileRows, left = c.query_count - first;
    Step step{};
    step.chunk = chunk;
    step.number = number;
    step.count = tiles * a.group;
    step.head = kv_head * a.group + number / tiles;
    step.size = left < kTileRows ? left : kTileRows;
    step.decays = levels && number == 0 && c.key_count > 0;
    if (step.decays) step.decay = decay_between(levels, -1, c.key_count - 1);
    step.from = static_cast<const T*>(p.q.data);
    const int mine = row0 + lane % 16;
    if (mine < step.size) {
      const int token = c.query_token + first + mine;
      step.from = lane < 16
                      ? view_row<T>(p.q, c.batch, step.head, token).data
                      : view_row<T>(b.grad_out, c.batch, step.head, token).data + first_column;
    }
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      if (row >= step.size) continue;
      const int64_t place =
          row_index(p, p.num_heads, c.batch, step.head, c.query_token + first + row);
      const auto at = static_cast<int>(c.query_pos - c.key_pos) + first + row;
      step.shift[half] = (levels ? decay_between(levels, -1, at) : 0.0f) -
                         static_cast<const float*>(p.row_scale)[place];
      step.inverse[half] = b.work.inverse[place];
      step.delta[half] = b.work.delta[place];
    }
    return step;
  }

  __device__ __forceinline__ Map map() const {
    return {params(), shared + Shared::key_omega, shared + Shared::key_lines};
  }
  __device__ __forceinline__ void load_map(int head) {
    const char* from = b.work.maps[0] + this->slice_at(head) * Map::kBytes;
    copy_block(shared + Shared::key_omega, from, Map::kMatrix);
    copy_block(shared + Shared::key_lines, from + Map::kMatrix, Map::kLines);
  }
  __device__ __forceinline__ void load_step(const Step& step, int turn) {
    if (!step.folds()) return;
    copy_warp_rows<kD>(this->template at<T>(Shared::keys), step.from, 0, row0, step.size,
                       static_cast<int>(params().headdim));
    copy_warp_rows<kV>(this->values(turn), step.from, 16, row0, step.size, this->value_width());
    if (a.group > 1) load_map(step.head);  // of a group the heads come by turns
  }

  // --- the walk ----------------------------------------------------------------------------------

  // Behind a chunk. After a barrier behind the last update.
  __device__ __forceinline__ void save_state(int chunk) const {
    const int64_t cell = cell_of(a, chunk, kv_head);
    this->save_tile(b.work.reverse, b.work.reverse_z, b.work.reverse_scale, cell);
  }

  template <class Between>
  __device__ __forceinline__ void fold(const Step& step, int turn, const Between& between) {
    float u[kM / 8][4];
    this->exponents(this->template at<T>(Shared::keys), map(), params().fq.beta, step.head, u);
    add_to_rows(u, step.shift);
    const bool kept[2] = {step.inverse[0] != 0.0f, step.inverse[1] != 0.0f};
    float* deltas = this->template at<float>(kDeltas);
    this->prepare_features(
        u, kept, step.decays, step.decay,
        [&] {
          between();
          if (lane % 4 != 0) return;
          deltas[row0 + lane / 4] = step.delta[0];
          deltas[row0 + lane / 4 + 8] = step.delta[1];
        },
        [&](int half, float x) { return x * step.inverse[half]; });
    __syncthreads();
    this->update_state(this->values(turn), step.decays, [&](int row) { return deltas[row]; });
  }

  // Over chunks [first, end) of the table, the last one first.
  __device__ __forceinline__ void run(int first, int end) {
    Step step = find_step(end - 1, 0);
    if (a.group == 1) load_map(step.head);
    load_step(step, 0);
    DIJIANG_UNROLL(1)
    for (int turn = 0;; turn ^= 1) {
      const bool last = step.number + 1 == step.count;
      const bool more = !last || step.chunk > first;
      Step next{};
      if (more) next = find_step(step.chunk - last, last ? 0 : step.number + 1);
      const auto between = [&] {
        if (kSaves && step.number == 0) save_state(step.chunk);
        if (more) load_step(next, turn ^ 1);
      };
      decay += step.decay;
      wait_copies();
      __syncthreads();  // the map is all threads' copy
      if (step.folds()) {
        fold(step, turn, between);
      } else {
        between();
      }
      if (!more) break;
      step = next;
    }
    __syncthreads();
  }

  // --- ends --------------------------------------------------------------------------------------

  // From the gradient of a sequence's final state, of which kv and z are multiples of 2^-log_scale.
  __device__ __forceinline__ void read_final(int64_t cell) {
    const bool given = b.grad_final_kv || b.grad_final_z;
    const int64_t place = this->feature_at(cell);
    this->each_element([](int, int, float& x) { x = 0.0f; });
    if (b.grad_final_kv) {
      this->each_of_kv(cell, [&](int64_t at, int, float& x) { x = b.grad_final_kv[at]; });
    }
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      const bool exists = given && i < this->feature_count();
      const float scale = exists ? -b.final_log_scale[place + i] : kEmpty;
      const bool any = exists && -scale > kNone;
      this->template at<float>(Shared::scale)[i] = any ? scale : kEmpty;
      this->template at<float>(Shared::z)[i] =
          any && b.grad_final_z ? -b.grad_final_z[place + i] : 0.0f;
      this->template at<float>(Shared::rest)[i] = 0.0f;
    }
  }
  __device__ __forceinline__ void write_initial(int64_t cell) {
    const auto* log_scale = static_cast<const float*>(params().initial.log_scale);
    const float* scale = this->template at<float>(Shared::scale);
    const int64_t place = this->feature_at(cell);
    if (b.grad_initial_kv) {
      this->each_of_kv(cell, [&](int64_t at, int i, float& x) {
        b.grad_initial_kv[at] = scale2(x, log_scale[place + i] + scale[i]);
      });
    }
    if (!b.grad_initial_z || first_column != 0) return;
    for (int i = threadIdx.x; i < this->feature_count(); i += kWalkThreads) {
      const int64_t at = place + i;
      b.grad_initial_z[at] =
          -scale2(this->template at<float>(Shared::z)[i], log_scale[at] + scale[i]);
    }
  }
};

}  // namespace dijiang::cuda
