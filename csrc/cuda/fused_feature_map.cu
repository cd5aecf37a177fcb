// The feature map of 16-bit inputs. A warp takes 16 rows at a time, of one head: omega stays in
// shared memory, the next rows are on their way while these are multiplied, and no warp waits for
// another.
#include "cuda/fused_feature_map.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_features.h"

namespace dijiang::cuda {
namespace {

constexpr int kWarpRows = 16;

// As a call of attention whose queries are x.
struct FeatureCall {
  LinearAttentionParams params;
  bool log;
  int64_t pieces;  // of 16 rows, of all sequences
  int slices;      // of the features, of a block
};

// In shared memory: the maps of the block's slices, then each warp's rows.
template <class Map>
constexpr int shared_bytes(int slices) {
  return slices * Map::kBytes + kWalkWarps * kWarpRows * 2 * Map::kD;
}

template <class Map>
struct FeatureWarp {
  using T = typename Map::T;
  static constexpr int kD = Map::kD, kM = Map::kM;

  const FeatureCall& f;
  const char* maps;
  T* tile;
  int head, first_slice, lane;

  // 16 rows of a sequence, or the last ones.
  struct Rows {
    int64_t batch, first;
    int count;
  };
  __device__ __forceinline__ Rows rows_of(unsigned piece) const {
    const int64_t seqlen = f.params.seqlen;
    const auto pieces = static_cast<unsigned>((seqlen + kWarpRows - 1) / kWarpRows);
    const int64_t first = int64_t{piece % pieces} * kWarpRows;
    return {piece / pieces, first,
            seqlen - first < kWarpRows ? static_cast<int>(seqlen - first) : kWarpRows};
  }

  __device__ __forceinline__ void load(const Rows& rows) const {
    constexpr int kPieces = kD / 8, kStep = 32 / kPieces;
    const LinearAttentionParams& p = f.params;
    const int column = lane % kPieces * 8, row = lane / kPieces;
    const int left = column < p.headdim ? rows.count - row : 0;
    const T* from = static_cast<const T*>(p.q.data) + rows.batch * p.q.stride_batch +
                    head * p.q.stride_head + (rows.first + row) * p.q.stride_seq + column;
    DIJIANG_UNROLL()
    for (int i = 0; i < kWarpRows; i += kStep) {
      copy_async(tile + tile_offset<kD>(row + i, column), from + i * p.q.stride_seq, i < left);
    }
  }

  __device__ __forceinline__ void run() const {
    const auto all = static_cast<unsigned>(f.pieces);
    const unsigned step = gridDim.x * kWalkWarps;
    unsigned piece = blockIdx.x * kWalkWarps + threadIdx.x / 32;
    if (piece >= all) return;
    Rows rows = rows_of(piece);
    load(rows);
    while (true) {
      wait_copies();
      __syncwarp();
      unsigned x[kD / 16][4];
      DIJIANG_UNROLL()
      for (int k = 0; k < kD; k += 16) load_left<kD>(x[k / 16], tile, 0, k);
      __syncwarp();
      piece += step;
      const bool more = piece < all;
      const Rows next = more ? rows_of(piece) : rows;
      if (more) load(next);
      DIJIANG_UNROLL(1)
      for (int slice = 0; slice < f.slices; ++slice) write(rows, slice, x);
      if (!more) break;
      rows = next;
    }
  }

  __device__ __forceinline__ void write(const Rows& rows, int slice,
                                        const unsigned (&x)[kD / 16][4]) const {
    const LinearAttentionParams& p = f.params;
    const int first_feature = (first_slice + slice) * kM;
    if (first_feature >= p.num_features) return;
    const char* matrix = maps + slice * Map::kBytes;
    const Map map{p, matrix, matrix + Map::kMatrix};
    float u[kM / 8][4];
    map.template exponents<kD / 16>(p.fq.beta, head, u, [&](unsigned(&left)[4], int k) {
      DIJIANG_UNROLL()
      for (int r = 0; r < 4; ++r) left[r] = x[k / 16][r];
    });
    const int row = lane / 4, left = static_cast<int>(p.num_features) - first_feature;
    T* out = static_cast<T*>(p.out) +
             ((rows.batch * p.num_heads + head) * p.seqlen + rows.first + row) * p.num_features +
             first_feature;
    DIJIANG_UNROLL()
    for (int half = 0; half < 2; ++half) {
      float y[kM / 8][2];
      DIJIANG_UNROLL()
      for (int t = 0; t < kM / 8; ++t) {
        DIJIANG_UNROLL()
        for (int e = 0; e < 2; ++e) {
          const float exponent = u[t][2 * half + e];
          y[t][e] = finite<T>(f.log ? exponent * kLn2 : fast_exp2(exponent));
        }
      }
      store_row(out + 8 * half * p.num_features, y, row + 8 * half < rows.count ? left : 0);
    }
  }
};

// On a multiprocessor.
template <class Map>
constexpr int kBlocks = shared_bytes<Map>(1) > 75 * 1024 ? 2
                        : Map::kD + Map::kM <= 128       ? 4
                                                         : 3;

// Grid: rows, head, slices.
template <class Map>
__global__ void __launch_bounds__(kWalkThreads, kBlocks<Map>)
    write_features(const __grid_constant__ FeatureCall f) {
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = f.params;
  const int head = blockIdx.y, first_slice = blockIdx.z * f.slices, warp = threadIdx.x / 32;
  for (int slice = 0; slice < f.slices; ++slice) {
    const int first_feature = (first_slice + slice) * Map::kM;
    if (first_feature >= p.num_features) break;
    char* matrix = raw + slice * Map::kBytes;
    Map::store(p, p.fq, head, first_feature, matrix, matrix + Map::kMatrix);
  }
  __syncthreads();
  auto* tiles = reinterpret_cast<typename Map::T*>(raw + f.slices * Map::kBytes);
  FeatureWarp<Map>{f,    raw,         tiles + warp * kWarpRows * Map::kD,
                   head, first_slice, static_cast<int>(threadIdx.x % 32)}
      .run();
}

// --- what applies --------------------------------------------------------------------------------

// Calls take(FeatureMap) for the sizes of p; false where there is no kernel for them.
template <class Take>
bool with_map(const LinearAttentionParams& p, const Take& take) {
  return with_16_bits(p, [&](auto x) {
    using T = std::decay_t<decltype(x)>;
    return with_tile_size<256>(p.headdim, [&](auto dim) {
      constexpr int kD = dim();
      if (p.kind != FeatureKind::kSoftmax || p.num_features <= 64) {
        take(static_cast<FeatureMap<T, kD, 64>*>(nullptr));
        return true;
      }
      // A softmax over features needs all of them at once.
      if constexpr (kD <= 128) {
        if (p.num_features <= 128) {
          take(static_cast<FeatureMap<T, kD, 128>*>(nullptr));
          return true;
        }
      }
      return false;
    });
  });
}

LinearAttentionParams as_call(const FeatureMapParams& p) {
  LinearAttentionParams call;
  call.dtype = p.dtype;
  call.kind = p.kind;
  call.batch = p.batch;
  call.num_heads = p.num_heads;
  call.seqlen = p.seqlen;
  call.headdim = p.headdim;
  call.headdim_v = call.num_features = p.num_features;
  call.q = p.x;
  call.fq = p.feature;
  call.scale = p.scale;
  call.out = p.out;
  return call;
}

int64_t row_pieces(const FeatureMapParams& p) { return p.batch * ceil_div(p.seqlen, kWarpRows); }

constexpr int64_t kBlocksPerMultiprocessor = 8;  // a few turns for each, so that none ends late

}  // namespace

bool fused_feature_map_applies(const FeatureMapParams& params) {
  if (!fused_switched_on() || params.num_heads > 65535) return false;
  if (row_pieces(params) > INT32_MAX) return false;
  const LinearAttentionParams p = as_call(params);
  if (!sizes_are_pieces(p) || !has_whole_pieces(p.q) || !begins_at_pieces(p.out)) return false;
  int bytes = 0;
  with_map(p, [&](auto* map) { bytes = shared_bytes<std::remove_pointer_t<decltype(map)>>(1); });
  return bytes > 0 && device_is_sm80() &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

cudaError_t fused_feature_map(const FeatureMapParams& params, cudaStream_t stream) {
  FeatureCall f{as_call(params), params.log, row_pieces(params), 1};
  const LinearAttentionParams& p = f.params;
  with_map(p, [&](auto* type) {
    using Map = std::remove_pointer_t<decltype(type)>;
    // Rows are read once a block: it takes all slices, so long as others have room beside it.
    const int64_t all = (p.num_features + Map::kM - 1) / Map::kM;
    const int room =
        device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocks<Map> - 1024;
    while (f.slices < all && shared_bytes<Map>(f.slices + 1) <= room) ++f.slices;
    const int64_t pieces = ceil_div(all, f.slices), others = p.num_heads * pieces;
    const int64_t tiles = ceil_div(f.pieces, kWalkWarps);
    const int64_t wanted =
        kBlocksPerMultiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t blocks = ceil_div(wanted, others);
    const int shared = shared_bytes<Map>(f.slices);
    allow_shared(write_features<Map>, shared);
    DIJIANG_LAUNCH(
        (write_features<Map>),
        dim3(grid_size(tiles < blocks ? tiles : blocks), grid_size(p.num_heads), grid_size(pieces)),
        kWalkThreads, shared, stream, f);
  });
  return launch_status();
}

}  // namespace dijiang::cuda
