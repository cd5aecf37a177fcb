// A problem of the oracle as the CUDA launchers take it: typed, strided, in exact-size buffers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "dijiang/core/linear_attention_cuda.h"
#include "oracle.h"

namespace emulated {

using dijiang::DType;

template <class T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr DType dtype = DType::kFloat32;
  static float narrow(double x) { return float(x); }
  static double widen(float x) { return x; }
};
template <>
struct Traits<__nv_bfloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static __nv_bfloat16 narrow(double x) { return __float2bfloat16_rn(float(x)); }
  static double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
};
template <>
struct Traits<__half> {
  static constexpr DType dtype = DType::kFloat16;
  static __half narrow(double x) { return __float2half_rn(float(x)); }
  static double widen(__half x) { return __half2float(x); }
};
template <class T>
double round_to(double x) {
  return Traits<T>::widen(Traits<T>::narrow(x));
}

template <class T>
std::vector<double> widen(const std::vector<T>& x) {
  std::vector<double> y;
  for (const T& e : x) y.push_back(Traits<T>::widen(e));
  return y;
}
inline std::vector<double> widen(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// The largest difference, against the largest value or the size of what was summed.
inline double error(const std::vector<double>& got, const std::vector<double>& want,
                    double size = 0.0) {
  double most = 0.0;
  size = std::fmax(size, 1e-30);
  for (size_t i = 0; i < want.size(); ++i) {
    if (!(std::fabs(got[i]) <= 1e300)) return INFINITY;
    most = std::fmax(most, std::fabs(got[i] - want[i]));
    size = std::fmax(size, std::fabs(want[i]));
  }
  return most / size;
}

// Which kernels ran, and their bank conflicts, are known since the last call of this.
inline void forget_kernels() {
  cuda_emulator::settings().kernels.clear();
  cuda_emulator::settings().bank_conflicts = 0;
}
inline bool ran(const std::string& kernel) {
  for (const std::string& name : cuda_emulator::settings().kernels) {
    if (name.find(kernel) != std::string::npos) return true;
  }
  return false;
}

// A problem with all kinds of features, elu with decay.
template <class Check>
void check_kinds_of(oracle::Problem p, const Check& check) {
  using dijiang::FeatureKind;
  for (const FeatureKind kind : {FeatureKind::kExp, FeatureKind::kSoftmax, FeatureKind::kElu}) {
    p.kind = kind;
    p.decay = kind == FeatureKind::kElu;
    check(p);
  }
}

// A race would make results depend on the order in which threads run, and on which warp is ahead.
template <class Run>
void expect_same_in_any_order(const Run& run) {
  using cuda_emulator::Schedule;
  const auto in_order = [&](Schedule schedule) {
    cuda_emulator::set_schedule(schedule);
    const std::vector<double> results = run();
    cuda_emulator::set_schedule(Schedule::kAscending);
    return results;
  };
  const auto first = in_order(Schedule::kAscending);
  for (const Schedule schedule : {Schedule::kDescending, Schedule::kShuffled,
                                  Schedule::kFirstWarpFirst, Schedule::kLastWarpFirst}) {
    EXPECT_EQ(first, in_order(schedule)) << "schedule " << static_cast<int>(schedule);
  }
}

// (batch, heads, seqlen, dim), laid out as the model would leave it rather than densely.
template <class T>
struct Tensor {
  std::vector<T> data;
  dijiang::ConstView view;

  // heads_inside: memory order (batch, seqlen, heads, dim); step: every step-th element is used.
  Tensor(const std::vector<double>& dense, int batch, int heads, int seqlen, int dim,
         bool heads_inside, int step) {
    view.stride_dim = step;
    view.stride_head = int64_t{dim} * step * (heads_inside ? 1 : seqlen);
    view.stride_seq = int64_t{dim} * step * (heads_inside ? heads : 1);
    view.stride_batch = int64_t{dim} * step * heads * seqlen;
    data.assign(dense.size() * step, Traits<T>::narrow(NAN));
    size_t i = 0;
    for (int b = 0; b < batch; ++b) {
      for (int h = 0; h < heads; ++h) {
        for (int t = 0; t < seqlen; ++t) {
          for (int j = 0; j < dim; ++j) {
            data[b * view.stride_batch + h * view.stride_head + t * view.stride_seq +
                 j * view.stride_dim] = Traits<T>::narrow(dense[i++]);
          }
        }
      }
    }
    view.data = data.data();
  }
  dijiang::ConstView from(int64_t token) const {
    dijiang::ConstView v = view;
    v.data = data.data() + token * view.stride_seq;
    return v;
  }
};

template <class T>
struct State {
  std::vector<float> kv, z, log_scale, window_decay, cache_decay, votes, sums;
  std::vector<T> window_k, window_v, sink_k, sink_v, cache_k, cache_v;
  std::vector<int64_t> length, cache_position;

  explicit State(const oracle::Problem& p) {
    const size_t cells = p.sequences().size() * p.kv_heads;
    kv.assign(cells * p.features * p.dim_v, 0.0f);
    z.assign(cells * p.features, 0.0f);
    log_scale.assign(cells * p.features, float(dijiang::kEmptyLogScale));
    // What a slot holds before its time is unspecified: NaN shows a read.
    window_decay.assign(p.decay ? cells * 2 * p.window : 0, NAN);
    window_k.assign(cells * 2 * p.window * p.dim, Traits<T>::narrow(NAN));
    window_v.assign(cells * 2 * p.window * p.dim_v, Traits<T>::narrow(NAN));
    sink_k.assign(cells * p.sinks * p.dim, Traits<T>::narrow(NAN));
    sink_v.assign(cells * p.sinks * p.dim_v, Traits<T>::narrow(NAN));
    length.assign(p.window + p.sinks > 0 ? p.sequences().size() : 0, 0);
    if (p.cache().most == 0) return;
    const size_t slots = p.sequences().size() * p.cache().all(p.kv_heads);
    cache_k.assign(slots * p.dim, Traits<T>::narrow(NAN));
    cache_v.assign(slots * p.dim_v, Traits<T>::narrow(NAN));
    cache_position.assign(slots, -1);
    cache_decay.assign(p.decay ? slots : 0, NAN);
    votes.assign(slots + cells * p.window, 0.0f);
    sums.assign(cells * (p.dim + p.dim_v), 0.0f);
  }
  dijiang::AttentionState pointers() {
    const auto data = [](auto& x) -> decltype(x.data()) { return x.empty() ? nullptr : x.data(); };
    dijiang::AttentionState s;
    s.kv = data(kv);
    s.z = data(z);
    s.log_scale = data(log_scale);
    s.window_k = data(window_k);
    s.window_v = data(window_v);
    s.window_decay = data(window_decay);
    s.sink_k = data(sink_k);
    s.sink_v = data(sink_v);
    s.length = data(length);
    s.cache_k = data(cache_k);
    s.cache_v = data(cache_v);
    s.cache_position = data(cache_position);
    s.cache_decay = data(cache_decay);
    s.votes = data(votes);
    s.sums = data(sums);
    return s;
  }
  std::vector<double> true_kv(int dim_v) const {
    std::vector<double> x;
    for (size_t i = 0; i < kv.size(); ++i) {
      x.push_back(std::ldexp(double(kv[i]), int(std::max(log_scale[i / dim_v], -1e6f))));
    }
    return x;
  }
  std::vector<double> true_z() const {
    std::vector<double> x;
    for (size_t i = 0; i < z.size(); ++i) {
      x.push_back(std::ldexp(double(z[i]), int(std::max(log_scale[i], -1e6f))));
    }
    return x;
  }
};

template <class T>
struct Gradients {
  std::vector<T> q, k, v;
  std::vector<float> omega_q, omega_k, weight_q, weight_k, beta_q, beta_k, log_decay;
  std::vector<float> initial_kv, initial_z;
};

template <class T>
struct Call {
  const oracle::Problem& p;
  Tensor<T> q, k, v, grad_out;
  std::vector<float> omega_q, omega_k, weight_q, weight_k, beta_q, beta_k, log_decay;
  std::vector<int32_t> segments;
  std::vector<T> out;
  std::vector<float> row_scale, row_sum;

  // value_step: every so many-th element of v is used. 1: rows that asynchronous copies can take.
  explicit Call(const oracle::Problem& problem, int value_step = 2)
      : p(problem),
        q(p.q, p.batch, p.heads, p.seqlen, p.dim, true, 1),
        k(p.k, p.batch, p.kv_heads, p.seqlen, p.dim, false, 1),
        v(p.v, p.batch, p.kv_heads, p.seqlen, p.dim_v, true, value_step),
        grad_out(p.grad_out, p.batch, p.heads, p.seqlen, p.dim_v, true, 1),
        omega_q(p.omega_q.begin(), p.omega_q.end()),
        omega_k(p.omega_k.begin(), p.omega_k.end()),
        weight_q(p.weight_q.begin(), p.weight_q.end()),
        weight_k(p.weight_k.begin(), p.weight_k.end()),
        beta_q(p.beta_q.begin(), p.beta_q.end()),
        beta_k(p.beta_k.begin(), p.beta_k.end()),
        log_decay(p.log_decay.begin(), p.log_decay.end()) {
    for (const auto& s : p.segments) segments.insert(segments.end(), s.begin(), s.end());
    out.assign(size_t(p.batch) * p.heads * p.seqlen * p.dim_v, Traits<T>::narrow(0.0));
    row_scale.assign(size_t(p.batch) * p.heads * p.seqlen, 0.0f);
    row_sum.assign(size_t(p.batch) * p.heads * p.seqlen, 0.0f);
  }

  dijiang::LinearAttentionParams params() {
    const auto data = [](const auto& x) { return x.empty() ? nullptr : x.data(); };
    dijiang::LinearAttentionParams a;
    a.dtype = Traits<T>::dtype;
    a.kind = p.kind;
    a.batch = p.batch;
    a.num_heads = p.heads;
    a.num_kv_heads = p.kv_heads;
    a.seqlen = p.seqlen;
    a.headdim = p.dim;
    a.headdim_v = p.dim_v;
    a.num_features = p.features;
    a.q = q.view;
    a.k = k.view;
    a.v = v.view;
    a.fq = {data(omega_q), data(weight_q), data(beta_q)};
    a.fk = {data(omega_k), data(weight_k), data(beta_k)};
    a.scale = p.scale;
    a.window = p.window;
    a.sinks = p.sinks;
    a.cache = p.cache();
    a.normalize = p.normalize;
    a.eps = p.eps;
    if (p.decay) {
      a.log_decay = log_decay.data();
      a.log_decay_stride_seq = 1;
      a.log_decay_stride_head = p.seqlen;
      a.log_decay_stride_batch = int64_t{p.seqlen} * p.kv_heads;
    }
    if (!segments.empty()) a.segments = segments.data();
    a.num_seqs = int64_t(p.sequences().size());
    a.out = out.data();
    a.row_scale = row_scale.data();
    a.row_sum = row_sum.data();
    return a;
  }

  static cudaError_t run(const dijiang::LinearAttentionParams& a) {
    const size_t bytes = dijiang::cuda::linear_attention_forward_workspace(a);
    std::unique_ptr<char, decltype(&std::free)> workspace(
        static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), &std::free);
    std::memset(workspace.get(), 0xFF, bytes);  // NaN
    return dijiang::cuda::linear_attention_forward(a, workspace.get(), nullptr);
  }

  // In one go.
  cudaError_t forward(State<T>* final_state = nullptr) {
    dijiang::LinearAttentionParams a = params();
    if (final_state) a.final = final_state->pointers();
    return run(a);
  }

  // Tokens [begin, end) of every row, from one state to the next; `out` gets its part.
  cudaError_t forward_part(int begin, int end, State<T>& from, State<T>& to) {
    dijiang::LinearAttentionParams a = part(begin, end);
    std::vector<T> piece(size_t(p.batch) * p.heads * (end - begin) * p.dim_v);
    a.out = piece.data();
    a.initial = from.pointers();
    a.final = to.pointers();
    const cudaError_t error = run(a);
    place(piece, begin, end);
    return error;
  }

  // All tokens up to the last cut, a call for each part; state: before and after them.
  cudaError_t forward_parts(const std::vector<int>& cuts, State<T>& state) {
    int begin = 0;
    for (const int end : cuts) {
      State<T> next(p);
      const cudaError_t error = forward_part(begin, end, state, next);
      if (error != cudaSuccess) return error;
      state = next;
      begin = end;
    }
    return cudaSuccess;
  }

  // Gradients of what `from` -> `to` computed, for tokens [begin, end); grad_to, if given, of the
  // final state's kv and z.
  Gradients<T> backward(int begin, int end, State<T>* from = nullptr, State<T>* to = nullptr,
                        const std::vector<float>& grad_kv = {},
                        const std::vector<float>& grad_z = {}) {
    dijiang::LinearAttentionBackwardParams b;
    b.forward = part(begin, end);
    const int64_t count = end - begin;
    std::vector<T> piece(size_t(p.batch) * p.heads * count * p.dim_v);
    std::vector<float> scale(size_t(p.batch) * p.heads * count), sum(scale.size());
    b.forward.out = piece.data();
    b.forward.row_scale = scale.data();
    b.forward.row_sum = sum.data();
    if (from) b.forward.initial = from->pointers();
    if (to) b.forward.final = to->pointers();
    std::vector<int32_t> hard(p.cache().most * p.kv_heads * b.forward.cache_rows(), -9);
    if (p.cache().most > 0) b.forward.chosen = hard.data();
    if (run(b.forward) != cudaSuccess) throw std::runtime_error("forward");
    if (p.cache().most > 0) b.forward.given = hard.data();
    b.forward.chosen = nullptr;

    Gradients<T> g;
    g.q.assign(size_t(p.batch) * p.heads * count * p.dim, Traits<T>::narrow(0.0));
    g.k.assign(size_t(p.batch) * p.kv_heads * count * p.dim, Traits<T>::narrow(0.0));
    g.v.assign(size_t(p.batch) * p.kv_heads * count * p.dim_v, Traits<T>::narrow(0.0));
    g.omega_q.assign(omega_q.size(), NAN);
    g.omega_k.assign(omega_k.size(), NAN);
    g.weight_q.assign(weight_q.size(), NAN);
    g.weight_k.assign(weight_k.size(), NAN);
    g.beta_q.assign(beta_q.size(), NAN);
    g.beta_k.assign(beta_k.size(), NAN);
    g.log_decay.assign(p.decay ? size_t(p.batch) * p.kv_heads * count : 0, 0.0f);
    const auto data = [](auto& x) -> void* { return x.empty() ? nullptr : x.data(); };
    b.grad_out = grad_out.from(begin);
    b.grad_q = data(g.q);
    b.grad_k = data(g.k);
    b.grad_v = data(g.v);
    b.grad_fq = {data(g.omega_q), data(g.weight_q), data(g.beta_q)};
    b.grad_fk = {data(g.omega_k), data(g.weight_k), data(g.beta_k)};
    b.grad_log_decay = data(g.log_decay);
    if (!grad_kv.empty()) {
      b.grad_final_kv = grad_kv.data();
      b.grad_final_z = grad_z.data();
      b.final_kv = to->kv.data();
      b.final_z = to->z.data();
      b.final_log_scale = to->log_scale.data();
    }
    if (from && p.window == 0) {
      g.initial_kv.assign(from->kv.size(), NAN);
      g.initial_z.assign(from->z.size(), NAN);
      b.grad_initial_kv = data(g.initial_kv);
      b.grad_initial_z = data(g.initial_z);
    }
    const size_t bytes = dijiang::cuda::linear_attention_backward_workspace(b);
    std::unique_ptr<char, decltype(&std::free)> workspace(
        static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), &std::free);
    std::memset(workspace.get(), 0xFF, bytes);
    b.workspace = workspace.get();
    if (dijiang::cuda::linear_attention_backward(b, nullptr) != cudaSuccess) {
      throw std::runtime_error("backward");
    }
    return g;
  }

  cudaError_t update(int token, State<T>& state) {
    dijiang::LinearAttentionParams a = part(token, token + 1);
    std::vector<T> piece(size_t(p.batch) * p.heads * p.dim_v);
    a.out = piece.data();
    a.final = state.pointers();
    const cudaError_t error = dijiang::cuda::linear_attention_update(a, nullptr);
    place(piece, token, token + 1);
    return error;
  }

 private:
  dijiang::LinearAttentionParams part(int begin, int end) {
    dijiang::LinearAttentionParams a = params();
    a.q = q.from(begin);
    a.k = k.from(begin);
    a.v = v.from(begin);
    if (p.decay) a.log_decay = log_decay.data() + begin;
    a.seqlen = end - begin;
    a.row_scale = nullptr;
    a.row_sum = nullptr;
    return a;
  }
  void place(const std::vector<T>& piece, int begin, int end) {
    const int count = end - begin;
    for (int row = 0; row < p.batch * p.heads; ++row) {
      std::copy_n(piece.begin() + int64_t{row} * count * p.dim_v, count * p.dim_v,
                  out.begin() + (int64_t{row} * p.seqlen + begin) * p.dim_v);
    }
  }
};

// The second call is given the hard keys that the first one chooses; kernels are those of the
// second.
template <class T>
void choose_and_give(Call<T>& chooses, Call<T>& given) {
  dijiang::LinearAttentionParams a = chooses.params(), b = given.params();
  std::vector<int32_t> table(a.num_kv_heads * a.cache_rows() * a.cache.most, -9);
  a.chosen = table.data();
  ASSERT_EQ(Call<T>::run(a), cudaSuccess);
  b.given = table.data();
  forget_kernels();
  ASSERT_EQ(Call<T>::run(b), cudaSuccess);
}

}  // namespace emulated
