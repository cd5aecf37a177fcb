// The choice of hard keys for 16-bit inputs: which calls it takes, and its kernels.
#include "cuda/fused_choice.h"

#include "cuda/fused_calls.h"
#include "cuda/fused_votes.h"
#include "cuda/hard_keys.h"

namespace dijiang::cuda {
namespace {

// Calls take(work), a pointer to the FusedChoice for the sizes of p; false where there is none.
template <class Take>
bool with_choice(const LinearAttentionParams& p, const Take& take) {
  return with_16_bits(p, [&](auto x) {
    return with_tile_size<256>(p.headdim, [&](auto dim) {
      take(static_cast<FusedChoice<std::decay_t<decltype(x)>, dim()>*>(nullptr));
      return true;
    });
  });
}

}  // namespace

bool fused_choice_applies(const LinearAttentionParams& p) {
  if (!fused_switched_on() || p.kind == FeatureKind::kGiven) return false;
  if (!sizes_are_pieces(p)) return false;
  if (!has_whole_pieces(p.q) || !has_whole_pieces(p.k) || !has_whole_pieces(p.v)) return false;
  if (!state_begins_at_pieces(p.initial)) return false;
  size_t bytes = 0;
  bool has_room = false;  // novelty's, for values
  with_choice(p, [&](auto* work) {
    using Fused = std::remove_pointer_t<decltype(work)>;
    bytes = Fused::bytes(p);
    has_room = p.headdim_v <= Fused::kMostColumns;
  });
  return has_room && device_is_sm80() &&
         static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) >= bytes;
}

void launch_fused_choice(const Attention& a, cudaStream_t stream) {
  const LinearAttentionParams& p = a.params;
  const dim3 grid(static_cast<unsigned>(p.num_seqs), static_cast<unsigned>(p.num_kv_heads));
  with_choice(p, [&](auto* work) {
    using Fused = std::remove_pointer_t<decltype(work)>;
    allow_shared(choose_hard_keys<Fused>, Fused::bytes(p));
    DIJIANG_LAUNCH(choose_hard_keys<Fused>, grid, kThreads, Fused::bytes(p), stream, a);
  });
}

}  // namespace dijiang::cuda
