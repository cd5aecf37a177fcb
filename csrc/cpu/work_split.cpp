#include "cpu/work_split.h"

#include <algorithm>

#include "cpu/sequence.h"

namespace dijiang::cpu {
namespace {

constexpr int64_t kLeastTokens = 128;  // of a piece
// Costs are counted in multiply-adds of a matrix product; everything else by what it was measured
// to take beside one.
constexpr double kSetUp = 1e6;       // of a piece: packed parameters, cleared scratch
constexpr double kExponent = 60;     // of a feature: the exponential and the maxima
constexpr double kNearWeight = 1.5;  // near keys a query sees, in windows

// What a pass costs a token.
struct Pass {
  double token = 0;    // in a piece
  double skipped = 0;  // walked over before a piece
  bool backwards = false;
};

// One product of rows with the features' matrix, and one exponential of each feature.
double product_cost(const LinearAttentionParams& p) {
  const bool product = p.kind != FeatureKind::kGiven && !p.fk.dct;
  return product ? static_cast<double>(p.num_features * p.headdim) : 0;
}
double exponent_cost(const LinearAttentionParams& p) {
  return kExponent * static_cast<double>(p.num_features);
}
double state_cost(const LinearAttentionParams& p) {
  return static_cast<double>(p.num_features * p.headdim_v);
}
// A product of a query's weights for the keys beside it with rows of `dim`.
double tile_cost(const LinearAttentionParams& p, int64_t dim) {
  const double keys = p.window > 0 ? kNearWeight * static_cast<double>(p.window) : kTile / 2.0;
  return (keys + static_cast<double>(p.cache.most)) * static_cast<double>(dim);
}
double rows_cost(const LinearAttentionParams& p) {
  return 1 + 4.0 * static_cast<double>(p.headdim + p.headdim_v);  // read, widened, written
}
int64_t weighed_dim(const LinearAttentionParams& p) {
  return p.window > 0 ? p.headdim : p.num_features;
}
double groups_of(const LinearAttentionParams& p) {
  return static_cast<double>(p.num_heads / std::max<int64_t>(1, p.num_kv_heads));
}
double key_cost(const LinearAttentionParams& p) {
  return rows_cost(p) + product_cost(p) + exponent_cost(p) + state_cost(p);
}

Pass forward_pass(const LinearAttentionParams& p) {
  Pass pass;
  pass.skipped = key_cost(p);
  pass.token =
      key_cost(p) + groups_of(p) * (key_cost(p) + tile_cost(p, weighed_dim(p) + p.headdim_v));
  return pass;
}

Pass queries_pass(const LinearAttentionParams& p) {
  const int64_t near = p.window > 0 ? 2 * p.headdim : p.num_features;
  Pass pass;
  pass.skipped = key_cost(p);
  pass.token =
      key_cost(p) + groups_of(p) * (2 * rows_cost(p) + 3 * product_cost(p) + 2 * exponent_cost(p) +
                                    state_cost(p) + tile_cost(p, near + p.headdim_v));
  return pass;
}

Pass keys_pass(const LinearAttentionParams& p) {
  const double query = 2 * rows_cost(p) + product_cost(p) + 2 * exponent_cost(p) + state_cost(p);
  const double key =
      2 * rows_cost(p) + 3 * product_cost(p) + 2 * exponent_cost(p) + 2 * state_cost(p);
  Pass pass;
  pass.backwards = true;
  pass.skipped = groups_of(p) * query;
  pass.token = pass.skipped + key + 2 * groups_of(p) * tile_cost(p, weighed_dim(p) + p.headdim_v);
  return pass;
}

class Splitter {
 public:
  Splitter(const LinearAttentionParams& params, std::vector<Pass> passes, int64_t num_threads)
      : p_(params), passes_(std::move(passes)), threads_(num_threads) {
    // A piece that ends a sequence writes its state while another may still have to read it.
    const bool in_place = p_.initial.kv ? p_.initial.kv == p_.final.kv
                                        : p_.initial.length && p_.initial.length == p_.final.length;
    // Queries choose the hard keys of later ones.
    const bool chosen = p_.cache.most > 0 && (p_.given == nullptr || p_.final.votes != nullptr);
    least_ = in_place || chosen || p_.headdim_v == 0 ? std::numeric_limits<int64_t>::max() / 2
                                                     : kLeastTokens;
  }

  struct Piece {
    size_t pass;
    int64_t share;
    AttentionPiece tokens;
  };

  std::vector<Piece> split() {
    double all = 0;
    const int64_t tasks = linear_attention_num_tasks(p_);
    for (int64_t task = 0; task < tasks; ++task) {
      for (const Pass& pass : passes_) {
        all += kSetUp + pass.token * static_cast<double>(Sequence(p_, task).length());
      }
    }
    if (threads_ <= 1) {
      fill(2 * all, 1);
      return pieces_;
    }
    double low = all / static_cast<double>(threads_), high = 2 * all;
    for (int i = 0; i < 16; ++i) {
      const double middle = (low + high) / 2;
      (fill(middle, threads_) ? high : low) = middle;
    }
    fill(high, threads_);
    return pieces_;
  }

 private:
  // Whether shares of at most `limit` each are enough.
  bool fill(double limit, int64_t shares) {
    pieces_.clear();
    const int64_t tasks = linear_attention_num_tasks(p_);
    int64_t share = 0;
    double left = limit;
    for (size_t pass = 0; pass < passes_.size(); ++pass) {
      for (int64_t task = 0; task < tasks; ++task) {
        const Sequence tokens(p_, task);
        int64_t done = 0;
        do {
          const double start = kSetUp + passes_[pass].skipped * static_cast<double>(done);
          const int64_t take = tokens_within(passes_[pass], tokens, done, left - start);
          if (take > 0 || tokens.length() == 0) {
            pieces_.push_back({pass, share, piece(passes_[pass], task, tokens, done, take)});
            left -= start + passes_[pass].token * static_cast<double>(take);
            done += take;
          } else if (left == limit) {
            return false;  // not even a share of its own
          }
          if (done < tokens.length()) {
            if (++share == shares) return false;
            left = limit;
          }
        } while (done < tokens.length());
      }
    }
    return true;
  }

  // How many tokens more, after `done`, cost at most `budget`.
  int64_t tokens_within(const Pass& pass, const Sequence& tokens, int64_t done,
                        double budget) const {
    const int64_t rest = tokens.length() - done;
    const double most = budget / pass.token;
    if (most >= static_cast<double>(rest)) return rest;
    if (most < static_cast<double>(least_) || rest < 2 * least_) return 0;
    int64_t take = std::min(static_cast<int64_t>(most), rest - least_);
    if (pass.backwards) {
      const int64_t begin = rest - take;
      take = tile_start(tokens, begin) == begin ? take : rest - next_start(tokens, begin);
    } else {
      take = tile_start(tokens, done + take) - done;
    }
    return take < least_ ? 0 : take;
  }

  AttentionPiece piece(const Pass& pass, int64_t task, const Sequence& tokens, int64_t done,
                       int64_t take) const {
    if (!pass.backwards) return {task, done, done + take};
    return {task, tokens.length() - done - take, tokens.length() - done};
  }

  // The first token of the tile that holds a token, both counted from the sequence's first. Tiles
  // end where a block of the window does.
  int64_t tile_start(const Sequence& tokens, int64_t token) const {
    const int64_t first = tokens.first_position(p_), position = first + token;
    int64_t start = p_.window > 0 ? position / p_.window * p_.window : first;
    start = std::max(start, first);
    return start + (position - start) / kTile * kTile - first;
  }
  int64_t next_start(const Sequence& tokens, int64_t token) const {
    const int64_t here = tile_start(tokens, token);
    int64_t next = here + kTile;
    if (p_.window > 0) {
      const int64_t first = tokens.first_position(p_);
      next = std::min(next, ((first + here) / p_.window + 1) * p_.window - first);
    }
    return std::min(next, tokens.length());
  }

  const LinearAttentionParams& p_;
  const std::vector<Pass> passes_;
  const int64_t threads_;
  int64_t least_;
  std::vector<Piece> pieces_;
};

}  // namespace

Shares<AttentionPiece> split_forward(const LinearAttentionParams& params, int64_t num_threads) {
  Shares<AttentionPiece> shares;
  for (const auto& piece : Splitter(params, {forward_pass(params)}, num_threads).split()) {
    while (shares.count() <= piece.share) shares.first.push_back(shares.first.back());
    shares.pieces.push_back(piece.tokens);
    ++shares.first.back();
  }
  return shares;
}

Shares<BackwardPiece> split_backward(const LinearAttentionBackwardParams& params,
                                     int64_t num_threads) {
  const LinearAttentionParams& p = params.forward;
  Shares<BackwardPiece> shares;
  int64_t slots[2] = {};
  for (const auto& piece : Splitter(p, {queries_pass(p), keys_pass(p)}, num_threads).split()) {
    while (shares.count() <= piece.share) shares.first.push_back(shares.first.back());
    const BackwardHalf half = piece.pass == 0 ? BackwardHalf::kQueries : BackwardHalf::kKeys;
    shares.pieces.push_back({piece.tokens, half, slots[piece.pass]++});
    ++shares.first.back();
  }
  return shares;
}

}  // namespace dijiang::cpu
