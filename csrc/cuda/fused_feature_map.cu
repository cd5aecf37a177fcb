// The feature map of 16-bit inputs: a block keeps omega of one head in shared memory, and its warps
// walk over the head's rows (fused_pieces.h).
#include "cuda/fused_feature_map.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_features.h"
#include "cuda/fused_pieces.h"

namespace dijiang::cuda {
namespace {

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
  return slices * Map::kBytes + kPieceBytes<Map::kD>;
}

// A slice of the features of a piece of rows.
template <class Map>
__device__ __forceinline__ void write_piece(
    const FeatureCall& f, const char* matrix, int head, int first_feature, const Piece& rows,
    const typename PieceWalk<typename Map::T, Map::kD>::Rows& x) {
  using T = typename Map::T;
  constexpr int kM = Map::kM;
  const LinearAttentionParams& p = f.params;
  const Map map{p, matrix, matrix + Map::kMatrix};
  float u[kM / 8][4];
  map.template exponents<Map::kD / 16>(p.fq.beta, head, u, [&](unsigned(&left)[4], int k) {
    DIJIANG_UNROLL()
    for (int r = 0; r < 4; ++r) left[r] = x[k / 16][r];
  });
  const int row = threadIdx.x % 32 / 4, width = static_cast<int>(p.num_features) - first_feature;
  T* out = static_cast<T*>(p.out) +
           ((rows.sequence * p.num_heads + head) * p.seqlen + rows.first + row) * p.num_features +
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
    store_row(out + 8 * half * p.num_features, y, row + 8 * half < rows.count ? width : 0);
  }
}

// On a multiprocessor.
template <class Map>
constexpr int kBlocks = shared_bytes<Map>(1) > 75 * 1024 ? 2
                        : Map::kD + Map::kM <= 128       ? 4
                                                         : 3;

// Grid: rows, head, slices.
template <class Map>
__global__ void __launch_bounds__(kWalkThreads, kBlocks<Map>)
    write_features(const __grid_constant__ FeatureCall f) {
  using T = typename Map::T;
  DIJIANG_DYNAMIC_SHARED(raw);
  const LinearAttentionParams& p = f.params;
  const int head = blockIdx.y, first_slice = blockIdx.z * f.slices;
  for (int slice = 0; slice < f.slices; ++slice) {
    const int first_feature = (first_slice + slice) * Map::kM;
    if (first_feature >= p.num_features) break;
    char* matrix = raw + slice * Map::kBytes;
    Map::store(p, p.fq, head, first_feature, matrix, matrix + Map::kMatrix);
  }
  __syncthreads();
  const PieceWalk<T, Map::kD> walk(raw + f.slices * Map::kBytes, p.seqlen, p.q.stride_seq, f.pieces,
                                   p.headdim);
  walk.run(
      [&](int64_t batch) {
        return static_cast<const T*>(p.q.data) + batch * p.q.stride_batch + head * p.q.stride_head;
      },
      [&](const Piece& rows, const auto& x) {
        DIJIANG_UNROLL(1)
        for (int slice = 0; slice < f.slices; ++slice) {
          const int first_feature = (first_slice + slice) * Map::kM;
          if (first_feature >= p.num_features) break;
          write_piece<Map>(f, raw + slice * Map::kBytes, head, first_feature, rows, x);
        }
      });
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

constexpr int64_t kBlocksPerMultiprocessor = 8;  // a few turns for each, so that none ends late

}  // namespace

bool fused_feature_map_applies(const FeatureMapParams& params) {
  if (!fused_switched_on() || params.num_heads > 65535) return false;
  if (count_pieces(params.batch, params.seqlen) > INT32_MAX) return false;
  const LinearAttentionParams p = as_call(params);
  if (!sizes_are_pieces(p) || !has_whole_pieces(p.q) || !begins_at_pieces(p.out)) return false;
  int bytes = 0;
  with_map(p, [&](auto* map) { bytes = shared_bytes<std::remove_pointer_t<decltype(map)>>(1); });
  return bytes > 0 && device_is_sm80() &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= bytes;
}

cudaError_t fused_feature_map(const FeatureMapParams& params, cudaStream_t stream) {
  FeatureCall f{as_call(params), params.log, count_pieces(params.batch, params.seqlen), 1};
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
