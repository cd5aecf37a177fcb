// The walks of the fused far backward: over the keys, which leaves the state before every chunk,
// and over the queries, backwards in time, which leaves R, rho and their scales N behind every
// chunk (backward_far.h, docs/numerics.md). Both are the forward's walk over keys (fused_walk.h)
// with a state written out on the way.
#pragma once

#include "cuda/fused_far_layout.h"
#include "cuda/fused_walk.h"

namespace dijiang::cuda {

// The walk's state as a tile of the chunk's, 16 bytes a lane.
template <class W>
__device__ __forceinline__ void write_tile(const W& walk, __nv_bfloat16* states, int64_t cell) {
  constexpr int kM = W::kM;
  const int64_t columns = walk.params().headdim_v;
  __nv_bfloat16* tile = states + (cell * columns + walk.first_column) * kM;
  DIJIANG_UNROLL()
  for (int n = 0; n < 2 * W::kStateTiles; ++n) {
    DIJIANG_UNROLL()
    for (int t = 0; t < kM / 8; t += 4) {
      unsigned packed[4];
      DIJIANG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        const float* s = walk.state[n / 2][t + i] + n % 2 * 2;
        packed[i] = pack<__nv_bfloat16>(s[0], s[1]);
      }
      transpose_quad(packed);
      *reinterpret_cast<uint4*>(tile +
                                tile_offset<kM>(walk.state_row(n), 8 * (t + walk.lane % 4))) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

template <class Shape>
struct StateWalk : Walk<Shape, false> {
  using Walk<Shape, false>::Walk;
  using Walk<Shape, false>::kM;
  using Shared = typename Walk<Shape, false>::Shared;

  // Of the chunk whose M' stands in shared memory, with the state as it was before.
  __device__ __forceinline__ void write_chunk(const FarWork& work, int64_t cell) const {
    write_tile(*this, work.state, cell);
    if (this->first_column != 0) return;
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      work.scale[cell * kM + i] = this->template at<float>(Shared::scale)[i];
      work.z[cell * kM + i] = this->template at<float>(Shared::z)[i];
      work.top[cell * kM + i] = this->template at<float>(Shared::top)[i];
    }
  }

  // first_chunk: of the part.
  __device__ __forceinline__ void run_and_write(const FarWork& work, int64_t first_chunk) {
    const bool has_decay = this->f.attention.has_decay;
    this->load_parameters(this->params().fk, this->kv_head, this->shared + Shared::key_omega,
                          this->shared + Shared::key_lines);
    this->load_keys(0);
    this->load_values(0);
    __syncthreads();
    DIJIANG_UNROLL(1)
    for (int first = 0; first < this->count; first += kTileRows) {
      const int left = this->count - first, tile_count = left < kTileRows ? left : kTileRows;
      this->wait_rows();
      this->sum_decay(first);
      this->prepare_keys(KeyMode{}, tile_count, false, [&] {
        this->load_values(first + kTileRows);
        if (!has_decay) this->load_keys(first + kTileRows);
      });
      write_chunk(work,
                  (first_chunk + first / kTileRows) * this->params().num_kv_heads + this->kv_head);
      if (has_decay) {
        this->prepare_keys({tile_count - 1, false, true}, tile_count, false,
                           [&] { this->load_keys(first + kTileRows); });
      }
      this->update_state(first, has_decay, [](int) { return 1.0f; });
    }
  }
};

// Queries take the place of keys, gradients of the outputs that of values; feature i of a row
// counts 2^(b_i - r) / den. One tile after another: the last chunk's heads, then those of the chunk
// before.
template <class Shape>
struct ReverseWalk : Walk<Shape, false> {
  using Base = Walk<Shape, false>;
  using Base::f;
  using Base::kD;
  using Base::kM;
  using Base::kV;
  using Base::kv_head;
  using Base::lane;
  using Base::row0;
  using Base::shared;
  using typename Base::T;
  using Shared = typename Base::Shared;
  // Two heads' matrices in turn, where a group has several.
  static constexpr int kDeltas = Shared::bytes(0);
  static constexpr int kSecond = kDeltas + kTileRows * static_cast<int>(sizeof(float));
  static constexpr int kSecondLines = kSecond + Shared::kMatrix;
  static constexpr int bytes(int group) {
    return group == 1 ? kSecond : kSecondLines + Shared::kLines;
  }

  const FarBackward& b;
  int group;

  __device__ __forceinline__ ReverseWalk(const FarBackward& backward, char* raw)
      : Base(backward.f, raw), b(backward), group(backward.f.attention.group) {}

  // --- a step: a chunk's queries of one head -----------------------------------------------------

  __device__ __forceinline__ int chunks() const {
    return (this->count + kTileRows - 1) / kTileRows;
  }
  __device__ __forceinline__ int first_of(int step) const {
    return (chunks() - 1 - step / group) * kTileRows;
  }
  __device__ __forceinline__ int head_of(int step) const { return kv_head * group + step % group; }
  __device__ __forceinline__ char* matrix(int step) const {
    return shared + (group > 1 && step % 2 ? kSecond : Shared::key_omega);
  }
  __device__ __forceinline__ char* lines(int step) const {
    return shared + (group > 1 && step % 2 ? kSecondLines : Shared::key_lines);
  }

  __device__ __forceinline__ void load(int step) {
    if (step >= chunks() * group) return;
    const int head = head_of(step), first = first_of(step);
    this->template load_rows<kD>(this->template at<T>(Shared::keys), this->params().q, head, first);
    this->template load_rows<kV>(this->values(step * kTileRows), b.grad_out, head, first,
                                 this->first_column);
    if (step > 0 && group == 1) return;
    constexpr int kPieces = Shared::kMatrix / 16, kLinePieces = Shared::kLines / 16;
    const auto* from = reinterpret_cast<const uint4*>(b.work.omega[0]) + int64_t{head} * kPieces;
    const auto* from_lines =
        reinterpret_cast<const uint4*>(b.work.lines[0]) + int64_t{head} * kLinePieces;
    for (int i = threadIdx.x; i < kPieces; i += kWalkThreads) {
      copy_async(matrix(step) + 16 * i, from + i, true);
    }
    for (int i = threadIdx.x; i < kLinePieces; i += kWalkThreads) {
      copy_async(lines(step) + 16 * i, from_lines + i, true);
    }
  }

  template <bool kWrites>
  __device__ __forceinline__ void take(int step, int64_t first_chunk) {
    const LinearAttentionParams& p = this->params();
    const int head = head_of(step), first = first_of(step);
    const int left = this->count - first, tile_count = left < kTileRows ? left : kTileRows;
    const bool begins = step % group == 0, decays = begins && f.attention.has_decay;
    wait_copies();
    __syncthreads();
    if (decays) {
      this->sum_decay(first);
      __syncthreads();
    }
    float a[kM / 8][4];
    this->exponents(this->template at<T>(Shared::keys), matrix(step), lines(step), p.fq.beta, head,
                    a);
    __syncwarp();
    load(step + 1);

    bool kept[2];
    float inverse[2];
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      const int64_t place = row_index(p, p.num_heads, this->batch, head, this->token + first + row);
      const bool inside = row < tile_count;
      inverse[half] = inside ? b.work.inverse[place] : 0.0f;
      kept[half] = inverse[half] != 0.0f;
      const float level = inside && f.attention.has_decay
                              ? float(this->template at<double>(Shared::levels)[row])
                              : 0.0f;
      const float scale = inside ? static_cast<const float*>(p.row_scale)[place] : 0.0f;
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        a[t][2 * half] = a[t][2 * half] + level - scale;
        a[t][2 * half + 1] = a[t][2 * half + 1] + level - scale;
      }
      if (lane % 4 == 0)
        this->template at<float>(kDeltas)[row] = inside ? b.work.delta[place] : 0.0f;
    }
    this->find_maxima(a, kept);
    __syncthreads();
    if (kWrites && begins) {
      write_chunk((first_chunk + first / kTileRows) * p.num_kv_heads + kv_head);
    }
    const double all = decays ? this->template at<double>(Shared::levels)[tile_count - 1] : 0.0;
    this->raise_tops(decays, static_cast<float>(all));
    this->write_features(a,
                         [&](int half, float x) { return kept[half] ? x * inverse[half] : 0.0f; });
    __syncthreads();
    this->update_state(step * kTileRows, decays,
                       [&](int token) { return this->template at<float>(kDeltas)[token]; });
  }

  // The state as it was before the step.
  __device__ __forceinline__ void write_chunk(int64_t cell) const {
    write_tile(*this, b.work.reverse, cell);
    if (this->first_column != 0) return;
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      b.work.reverse_scale[cell * kM + i] = this->template at<float>(Shared::scale)[i];
      b.work.reverse_z[cell * kM + i] = this->template at<float>(Shared::z)[i];
    }
  }

  template <bool kWrites>
  __device__ __forceinline__ void run_back(int64_t first_chunk) {
    load(0);
    DIJIANG_UNROLL(1)
    for (int step = 0; step < chunks() * group; ++step) take<kWrites>(step, first_chunk);
    __syncthreads();
  }

  // --- ends --------------------------------------------------------------------------------------

  // From the gradient of a sequence's final state.
  __device__ __forceinline__ void read_final(int64_t cell) {
    this->read_state(b.grad_final_kv, nullptr, nullptr, cell);
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      float scale = kEmpty, z = 0.0f;
      if ((b.grad_final_kv || b.grad_final_z) && b.final_log_scale[cell * kM + i] > kNone) {
        scale = -b.final_log_scale[cell * kM + i];
        if (b.grad_final_z) z = -b.grad_final_z[cell * kM + i];
      }
      this->template at<float>(Shared::scale)[i] = scale;
      this->template at<float>(Shared::z)[i] = z;
      this->template at<float>(Shared::rest)[i] = 0.0f;
    }
  }
  __device__ __forceinline__ void write_initial(int64_t cell) const {
    const auto* log_scale = static_cast<const float*>(this->params().initial.log_scale);
    const float* scale = this->template at<float>(Shared::scale);
    if (b.grad_initial_kv) {
      Base::each_element_of(*this, cell, [&](int64_t place, int i, float x) {
        b.grad_initial_kv[place] = scale2(x, log_scale[cell * kM + i] + scale[i]);
      });
    }
    if (!b.grad_initial_z || this->first_column != 0) return;
    for (int i = threadIdx.x; i < kM; i += kWalkThreads) {
      b.grad_initial_z[cell * kM + i] =
          -scale2(this->template at<float>(Shared::z)[i], log_scale[cell * kM + i] + scale[i]);
    }
  }
};

}  // namespace dijiang::cuda
