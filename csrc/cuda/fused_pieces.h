// A warp's walk over rows that one matrix multiplies, 16 at a time: the next ones are on their way
// while these are multiplied, and no warp waits for another.
#pragma once

#include "cuda/attention_layout.h"
#include "cuda/fused_tiles.h"

namespace dijiang::cuda {

constexpr int kPieceRows = 16;

// Rows of a sequence: 16, or the last ones.
struct Piece {
  int64_t sequence, first;
  int count;
};

inline int64_t count_pieces(int64_t sequences, int64_t seqlen) {
  return sequences * ceil_div(seqlen, kPieceRows);
}

// Shared memory of a block's warps, in bytes.
template <int kD>
constexpr int kPieceBytes = kWalkWarps* kPieceRows * 2 * kD;

// kD: columns of a tile, those behind `width` are zeros.
template <class T, int kD>
struct PieceWalk {
  using Rows = unsigned[kD / 16][4];  // of a piece, left operands

  T* tile;          // the warp's own
  int64_t seqlen;   // of a sequence
  int64_t stride;   // from row to row, in elements
  unsigned pieces;  // of all sequences
  int width, lane;

  __device__ __forceinline__ PieceWalk(char* tiles, int64_t rows, int64_t row_stride, int64_t all,
                                       int64_t columns)
      : tile(reinterpret_cast<T*>(tiles) + threadIdx.x / 32 * kPieceRows * kD),
        seqlen(rows),
        stride(row_stride),
        pieces(static_cast<unsigned>(all)),
        width(static_cast<int>(columns)),
        lane(threadIdx.x % 32) {}

  __device__ __forceinline__ Piece piece(unsigned number) const {
    const auto each = static_cast<unsigned>((seqlen + kPieceRows - 1) / kPieceRows);
    const int64_t first = int64_t{number % each} * kPieceRows;
    return {number / each, first,
            seqlen - first < kPieceRows ? static_cast<int>(seqlen - first) : kPieceRows};
  }

  __device__ __forceinline__ void load(const Piece& rows, const T* sequence) const {
    constexpr int kParts = kD / 8, kStep = 32 / kParts;
    const int column = lane % kParts * 8, row = lane / kParts;
    const int left = column < width ? rows.count - row : 0;
    const T* from = sequence + (rows.first + row) * stride + column;
    DIJIANG_UNROLL()
    for (int i = 0; i < kPieceRows; i += kStep) {
      copy_async(tile + tile_offset<kD>(row + i, column), from + i * stride, i < left);
    }
  }

  // begin(n): where sequence n begins; take(piece, rows).
  template <class Begin, class Take>
  __device__ __forceinline__ void run(const Begin& begin, const Take& take) const {
    unsigned number = blockIdx.x * kWalkWarps + threadIdx.x / 32;
    if (number >= pieces) return;
    Piece now = piece(number);
    load(now, begin(now.sequence));
    while (true) {
      wait_copies();
      __syncwarp();
      Rows x;
      DIJIANG_UNROLL()
      for (int k = 0; k < kD; k += 16) load_left<kD>(x[k / 16], tile, 0, k);
      __syncwarp();
      number += gridDim.x * kWalkWarps;
      const bool more = number < pieces;
      const Piece next = more ? piece(number) : now;
      if (more) load(next, begin(next.sequence));
      take(now, x);
      if (!more) break;
      now = next;
    }
  }
};

}  // namespace dijiang::cuda
