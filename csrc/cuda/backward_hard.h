// Gradients of hard keys from the queries that see them in their slots, added to those that
// grad_near_keys leaves.
#pragma once

#include "cuda/backward_near.h"

namespace dijiang::cuda {

template <int kColumns>
struct HardShared {
  static constexpr int kStride = NearShared<kColumns>::kStride;
  static constexpr int kFloats = NearShared<kColumns>::kFloats + kRows * kStride + kRows;
};

// One thread block walks back over the blocks of a sequence with 64 slots of a kv head and some
// columns of k, then of v: a key's gradient is complete where its slot changes hands. Grid:
// (sequence, slot tile), kv head, columns.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) grad_hard_keys(Backward b) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const NearShared<kColumns> tiles(reinterpret_cast<float*>(raw));
  float* sums = tiles.x_tile + NearShared<kColumns>::kFloats;  // (64, kColumns)
  constexpr int kStride = NearShared<kColumns>::kStride;
  int* held = reinterpret_cast<int*>(sums + kRows * kStride);
  const Attention& a = b.forward;
  const LinearAttentionParams& p = a.params;
  const KeyColumns<kColumns> columns(p);
  const int64_t slot_tiles = (p.cache.most + kRows - 1) / kRows;
  const int64_t n = blockIdx.x / slot_tiles, slot0 = blockIdx.x % slot_tiles * kRows;
  const int head = blockIdx.y, tid = threadIdx.x;
  const Sequence s = find_sequence(a, n);
  if (s.length == 0) return;
  const Chunk c = whole_sequence(a, n, s);
  const Keys<T> keys{a, c, head};
  const int slots = static_cast<int>(p.cache.most - slot0 < kRows ? p.cache.most - slot0 : kRows);

  // What slot r gathered goes to its key.
  const auto flush = [&](int r, int j) {
    const float x = sums[r * kStride + j] * columns.factor;
    sums[r * kStride + j] = 0.0f;
    if (held[r] < s.start_pos || columns.j0 + j >= columns.width) return;
    const int64_t row = row_index(p, p.num_kv_heads, c.batch, head, token_of(c, held[r]));
    (columns.for_values ? b.work.grad_v : b.work.near_k)[row * columns.width + columns.j0 + j] += x;
  };
  for (int e = tid; e < kRows * kStride; e += kThreads) sums[e] = 0.0f;
  for (int r = tid; r < kRows; r += kThreads) held[r] = -1;
  __syncthreads();

  for (int64_t block = (c.end_pos - 1) / p.window; block >= s.start_pos / p.window; --block) {
    const int64_t row = row_of(a, c, head, block);
    const int32_t* now = a.work.slots + row * p.cache.most + slot0;
    const int64_t filled = a.work.slot_count[row] - slot0;
    const int count = static_cast<int>(filled < 0 ? 0 : filled < slots ? filled : slots);
    for (int e = tid; e < slots * kColumns; e += kThreads) {
      if (held[e / kColumns] != now[e / kColumns]) flush(e / kColumns, e % kColumns);
    }
    __syncthreads();
    for (int r = tid; r < slots; r += kThreads) held[r] = now[r];
    __syncthreads();
    if (count == 0) continue;

    const int64_t begin = block * p.window > s.start_pos ? block * p.window : s.start_pos;
    const int64_t end = (block + 1) * p.window < c.end_pos ? (block + 1) * p.window : c.end_pos;
    TileProduct<T, kColumns> product;
    for (int g = 0; g < a.group; ++g) {
      add_key_gradients<T, kColumns>(
          b, c, tiles, columns, head * a.group + g, begin, end, count,
          [&](int i) { return keys.key(held[i], slot0 + i); },
          [&](int i) { return keys.value(held[i], slot0 + i); }, [](int64_t, int) { return true; },
          product);
    }
    product.store(tiles.result, kStride);
    __syncthreads();
    for (int e = tid; e < count * kColumns; e += kThreads) {
      const int at = e / kColumns * kStride + e % kColumns;
      sums[at] += tiles.result[at];
    }
    __syncthreads();
  }
  for (int e = tid; e < slots * kColumns; e += kThreads) flush(e / kColumns, e % kColumns);
}

}  // namespace dijiang::cuda
