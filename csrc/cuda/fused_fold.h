// One block's walk over the keys that chunks of a sequence fold, for kValueDim columns of v. It
// leaves the state before each chunk in the workspace, in the form in which rows read it. Keys are
// those of FoldedKeys, 64 at a time; their rows may lie anywhere.
#pragma once

#include "cuda/fused_state.h"

namespace dijiang::cuda {

// Of the blocks of `parts` parts a sequence: which part of the chunk table this one has.
struct FoldPart {
  int64_t seq;
  int index, first, end;
  bool is_last;

  __device__ FoldPart(const Attention& a, int parts)
      : FoldPart(a, blockIdx.x / parts, static_cast<int>(blockIdx.x % parts)) {}
  __device__ FoldPart(const Attention& a, int64_t sequence, int part) : seq(sequence), index(part) {
    const int chunks = a.work.parts.chunks, behind = a.work.first_chunk[seq + 1];
    first = a.work.first_chunk[seq] + index * chunks;
    is_last = first + chunks >= behind;
    end = is_last ? behind : first + chunks;
  }
  // Of the sequence's parts.
  __device__ int last(const Attention& a) const {
    return (a.work.first_chunk[seq + 1] - a.work.first_chunk[seq] - 1) / a.work.parts.chunks;
  }
  // Of a state of all parts but the last.
  __device__ int64_t cell(const Attention& a, int part, int head) const {
    return (seq * (a.work.parts.count - 1) + part) * a.params.num_kv_heads + head;
  }
};

// kSaves: whether states before chunks are wanted, or but the last.
template <class Shape, bool kSaves>
struct FoldWalk : StateWalk<Shape, FusedShared<Shape, false>> {
  using Base = StateWalk<Shape, FusedShared<Shape, false>>;
  using Base::a;
  using Base::first_column;
  using Base::kD;
  using Base::kM;
  using Base::kParts;
  using Base::kStateTiles;
  using Base::kV;
  using Base::kv_head;
  using Base::lane;
  using Base::params;
  using Base::row0;
  using Base::state;
  using typename Base::Shared;
  using typename Base::T;

  const Chunk* sequence;  // its first chunk: what all of its chunks say alike
  double decay = 0.0;     // of all chunks so far, base 2

  __device__ __forceinline__ FoldWalk(const Attention& attention, char* raw, int head, int64_t seq)
      : Base(attention, raw, head),
        sequence(attention.work.chunks + attention.work.first_chunk[seq]) {}

  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return Base::template at<U>(offset);
  }

  // --- steps -------------------------------------------------------------------------------------

  // A tile of the keys that a chunk folds; of a chunk that folds none, an empty one.
  struct Step {
    int chunk, tile;
    int tiles;  // of the chunk
    int size;   // keys
    bool decays;
    float decay;         // of the state, up to the chunk's last key
    float key_decay[2];  // of the lane's two rows, likewise
    int64_t pos;         // of the key whose row the lane finds
    int slot;

    __device__ bool folds() const { return size > 0 || decays; }
  };
  // Read a step early, and whether the tile holds a key is not asked: nothing waits.
  __device__ __forceinline__ Step find_step(int chunk, int tile) const {
    const Chunk& c = a.work.chunks[chunk];
    const FoldedKeys folded(a, c, chunk, kv_head);
    const int first = folded.first + tile * kTileRows;
    const int left = folded.count - first, most = c.key_count - first;
    Step step{};
    step.chunk = chunk;
    step.tile = tile;
    step.tiles = c.key_count > kTileRows ? (c.key_count + kTileRows - 1) / kTileRows : 1;
    step.size = left < 0 ? 0 : left < kTileRows ? left : kTileRows;
    step.decays = a.has_decay && tile == 0 && c.key_count > 0;
    if (step.decays) step.decay = decay_between(folded.levels, -1, c.key_count - 1);
    const int mine = row0 + lane % 16;
    if (mine < most) {
      step.pos = folded.pos(first + mine);
      step.slot = folded.slot(first + mine);
    }
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      step.key_decay[half] = row < most ? folded.decay(first + row) : 0.0f;
    }
    return step;
  }

  // Lanes 0 to 15 find the warp's rows of k, the others those of v.
  __device__ __forceinline__ void load_step(const Step& step, int stage) {
    if (!step.folds()) return;
    const auto* from = static_cast<const T*>(params().k.data);
    if (row0 + lane % 16 < step.size) {
      const Keys<T> all{a, *sequence, kv_head};
      from = lane < 16 ? all.key(step.pos, step.slot).data
                       : all.value(step.pos, step.slot).data + first_column;
    }
    copy_warp_rows<kD>(at<T>(Shared::keys), from, 0, row0, step.size,
                       static_cast<int>(params().headdim));
    copy_warp_rows<kV>(this->values(stage), from, 16, row0, step.size, this->value_width());
  }

  // --- states ------------------------------------------------------------------------------------

  // Before a chunk. Behind a barrier after the last update.
  __device__ __forceinline__ void save_state(int chunk) const {
    const int64_t cell = cell_of(a, chunk, kv_head);
    this->save_tile(static_cast<__nv_bfloat16*>(a.work.states), a.work.z, a.work.scale, cell);
  }

  // --- the walk ----------------------------------------------------------------------------------

  template <class Between>
  __device__ __forceinline__ void fold(const Step& step, int stage, const Between& between) {
    float u[kM / 8][4];
    this->key_exponents(u);
    const int row = row0 + lane / 4;
    const bool kept[2] = {row < step.size, row + 8 < step.size};
    if (a.has_decay) add_to_rows(u, step.key_decay);
    this->prepare_features(u, kept, step.decays, step.decay, between);
    __syncthreads();
    this->update_state(this->values(stage), step.decays);
  }

  // Over chunks [first, end) of the table.
  __device__ __forceinline__ void run(int first, int end) {
    this->store_key_map();
    Step step = find_step(first, 0);
    load_step(step, 0);
    __syncthreads();
    DIJIANG_UNROLL(1)
    for (int stage = 0;; stage ^= 1) {
      const bool last_tile = step.tile + 1 == step.tiles;
      const bool more = !last_tile || step.chunk + 1 < end;
      Step next{};
      if (more) next = find_step(step.chunk + last_tile, last_tile ? 0 : step.tile + 1);
      const auto between = [&] {
        if (kSaves && step.tile == 0) save_state(step.chunk);
        if (more) load_step(next, stage ^ 1);
      };
      decay += step.decay;
      this->wait_rows();
      if (step.folds()) {
        fold(step, stage, between);
      } else {
        __syncthreads();
        between();
      }
      if (!more) break;
      step = next;
    }
    __syncthreads();
  }
};

}  // namespace dijiang::cuda
