// Every operator of the namespace, in one place. `*_fwd` and `*_bwd` are functional; `*_update`
// writes the state it is given. An optional result that was not asked for comes back with no
// elements. Enumerations travel as integers: see FeatureKind.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dijiang, m) {
  m.def("dct(Tensor x, int type) -> Tensor");

  m.def(
      "feature_map_fwd(Tensor x, Tensor omega, Tensor? log_weight, Tensor? beta, int kind, "
      "float scale, bool log) -> Tensor");
  m.def(
      "feature_map_bwd(Tensor grad_out, Tensor x, Tensor out, Tensor omega, Tensor? log_weight, "
      "Tensor? beta, int kind, float scale, bool log) "
      "-> (Tensor grad_x, Tensor grad_omega, Tensor grad_log_weight, Tensor grad_beta)");

  m.def(
      "linear_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? segments, "
      "Tensor? kv, Tensor? z, Tensor? log_scale, bool normalize, float eps, bool return_state) "
      "-> (Tensor out, Tensor row_scale, Tensor row_sum, Tensor final_kv, Tensor final_z, "
      "Tensor final_log_scale)");
  m.def(
      "linear_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
      "Tensor? segments, Tensor? kv, Tensor? z, Tensor? log_scale, Tensor out, Tensor row_scale, "
      "Tensor row_sum, Tensor? grad_final_kv, Tensor? grad_final_z, Tensor? final_kv, "
      "Tensor? final_z, Tensor? final_log_scale, bool normalize, float eps, bool grad_initial) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, Tensor grad_kv, "
      "Tensor grad_z)");
  m.def(
      "linear_attention_update(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) kv, "
      "Tensor(b!) z, Tensor(c!) log_scale, bool normalize, float eps) -> Tensor");

  m.def(
      "kernelized_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_omega, "
      "Tensor? q_log_weight, Tensor? q_beta, Tensor? k_omega, Tensor? k_log_weight, "
      "Tensor? k_beta, Tensor? log_decay, Tensor? segments, Tensor? kv, Tensor? z, "
      "Tensor? log_scale, Tensor? window_k, Tensor? window_v, Tensor? window_decay, "
      "Tensor? sink_k, Tensor? sink_v, Tensor? length, "
      "Tensor? cache_k, Tensor? cache_v, Tensor? cache_position, "
      "Tensor? cache_decay, Tensor? cache_votes, Tensor? cache_sums, Tensor? hard_keys, int kind, "
      "float scale, int window, "
      "int sinks, int[] cache_size, bool normalize, float eps, bool return_state) "
      "-> (Tensor out, Tensor row_scale, Tensor row_sum, Tensor final_kv, Tensor final_z, "
      "Tensor final_log_scale, Tensor final_window_k, Tensor final_window_v, "
      "Tensor final_window_decay, Tensor final_sink_k, Tensor final_sink_v, Tensor final_length, "
      "Tensor final_cache_k, Tensor final_cache_v, Tensor final_cache_position, "
      "Tensor final_cache_decay, Tensor final_cache_votes, Tensor final_cache_sums, "
      "Tensor chosen_hard_keys)");
  m.def(
      "kernelized_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? q_omega, "
      "Tensor? q_log_weight, Tensor? q_beta, Tensor? k_omega, Tensor? k_log_weight, "
      "Tensor? k_beta, Tensor? log_decay, Tensor? segments, Tensor? kv, Tensor? z, "
      "Tensor? log_scale, Tensor? window_k, Tensor? window_v, Tensor? window_decay, "
      "Tensor? sink_k, Tensor? sink_v, Tensor? length, "
      "Tensor? cache_k, Tensor? cache_v, Tensor? cache_position, "
      "Tensor? cache_decay, Tensor? cache_votes, Tensor? cache_sums, Tensor hard_keys, Tensor out, "
      "Tensor row_scale, "
      "Tensor row_sum, Tensor? grad_final_kv, Tensor? grad_final_z, Tensor? final_kv, "
      "Tensor? final_z, Tensor? final_log_scale, int kind, float scale, int window, int sinks, "
      "int[] cache_size, "
      "bool normalize, float eps, bool grad_params, bool grad_initial) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_omega, "
      "Tensor grad_q_log_weight, Tensor grad_q_beta, Tensor grad_k_omega, "
      "Tensor grad_k_log_weight, Tensor grad_k_beta, Tensor grad_log_decay, Tensor grad_kv, "
      "Tensor grad_z)");
  m.def(
      "kernelized_attention_update(Tensor q, Tensor k, Tensor v, Tensor? q_omega, "
      "Tensor? q_log_weight, Tensor? q_beta, Tensor? k_omega, Tensor? k_log_weight, "
      "Tensor? k_beta, Tensor? log_decay, Tensor(a!) kv, Tensor(b!) z, Tensor(c!) log_scale, "
      "Tensor(d!) window_k, Tensor(e!) window_v, Tensor(f!)? window_decay, Tensor(g!) sink_k, "
      "Tensor(h!) sink_v, Tensor(i!)? length, "
      "Tensor(j!)? cache_k, Tensor(k!)? cache_v, Tensor(l!)? cache_position, "
      "Tensor(m!)? cache_decay, Tensor(n!)? cache_votes, Tensor(o!)? cache_sums, int kind, float "
      "scale, int window, int sinks, int[] cache_size, "
      "bool normalize, float eps) -> Tensor");
}
