// The Python module dijiang._core: facts of the build, and the CPU kernels on NumPy arrays, without
// torch. One thread; the operators of dijiang.ops are parallel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>

#include "cpu/cpu_level.h"
#include "dijiang/core/dct.h"
#include "dijiang/core/linear_attention.h"

namespace py = pybind11;

namespace dijiang {
namespace {

std::string shape_text(const py::array& a) { return py::str(a.attr("shape")).cast<std::string>(); }

DType dtype_of(const py::array& a, const char* function, const char* name) {
  if (a.dtype().is(py::dtype::of<float>())) return DType::kFloat32;
  if (a.dtype().is(py::dtype::of<double>())) return DType::kFloat64;
  throw py::type_error(std::string(function) + ": " + name + " must be float32 or float64, got " +
                       py::str(a.dtype()).cast<std::string>());
}

// The last four dimensions of a with strides in elements; missing leading ones have length 1.
ConstView view_of(const py::array& a, const char* function, const char* name) {
  int64_t strides[4] = {};
  for (py::ssize_t i = 0; i < a.ndim(); ++i) {
    if (a.strides(i) % a.itemsize() != 0) {
      throw py::value_error(std::string(function) + ": " + name +
                            " must have strides that are whole elements; copy it first");
    }
    strides[4 - a.ndim() + i] = a.strides(i) / a.itemsize();
  }
  return {a.data(), strides[0], strides[1], strides[2], strides[3]};
}

py::array dct(const py::array& x, int type) {
  if (type != 2 && type != 3) {
    throw py::value_error("dct: type must be 2 or 3, got " + std::to_string(type));
  }
  if (x.ndim() < 1 || x.shape(x.ndim() - 1) < 1) {
    throw py::value_error("dct: x must have a last dimension of at least 1, got shape " +
                          shape_text(x));
  }
  DctParams p;
  p.dtype = dtype_of(x, "dct", "x");
  p.type = type;
  p.n = x.shape(x.ndim() - 1);
  py::array source = x;
  if (x.ndim() > 4) {
    source = py::array::ensure(x, py::array::c_style);
    source = source.reshape({py::ssize_t(-1), py::ssize_t(p.n)});
  }
  p.x = view_of(source, "dct", "x");
  const auto length = [&](py::ssize_t from_end) -> int64_t {
    return source.ndim() >= from_end ? source.shape(source.ndim() - from_end) : 1;
  };
  p.batch = length(4);
  p.heads = length(3);
  p.seqlen = length(2);
  py::array out(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  p.out = out.mutable_data();
  const py::gil_scoped_release release;
  cpu::dct(p, 0, p.batch * p.heads * p.seqlen);
  return out;
}

py::array linear_attention(const py::array& q, const py::array& k, const py::array& v,
                           const std::optional<py::array>& log_decay, bool normalize, double eps) {
  const char* name = "linear_attention";
  LinearAttentionParams p;
  p.dtype = dtype_of(q, name, "q");
  if (q.ndim() != 4) {
    throw py::value_error(
        "linear_attention: q must have shape (batch, heads, seqlen, features), "
        "got " +
        shape_text(q));
  }
  p.batch = q.shape(0);
  p.num_heads = q.shape(1);
  p.seqlen = q.shape(2);
  p.headdim = p.num_features = q.shape(3);
  const auto expect = [&](const py::array& a, const char* what, const char* dimensions,
                          const std::vector<int64_t>& shape) {
    if (dtype_of(a, name, what) != p.dtype) {
      throw py::type_error(std::string("linear_attention: ") + what + " must have the dtype of q");
    }
    bool fits = a.ndim() == py::ssize_t(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) {
      fits = shape[i] < 0 || shape[i] == a.shape(i);
    }
    if (fits) return;
    std::ostringstream text;
    text << "linear_attention: " << what << " must have shape (";
    for (size_t i = 0; i < shape.size(); ++i) {
      text << (i ? ", " : "") << (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
    }
    text << ") " << dimensions << ", got " << shape_text(a);
    throw py::value_error(text.str());
  };
  expect(k, "k", "(batch, kv heads, seqlen, features)", {p.batch, -1, p.seqlen, p.headdim});
  p.num_kv_heads = k.shape(1);
  if (p.num_kv_heads == 0 || p.num_heads % p.num_kv_heads != 0) {
    throw py::value_error("linear_attention: the " + std::to_string(p.num_kv_heads) +
                          " kv heads of k must divide the " + std::to_string(p.num_heads) +
                          " heads of q");
  }
  expect(v, "v", "(batch, kv heads, seqlen, values)", {p.batch, p.num_kv_heads, p.seqlen, -1});
  p.headdim_v = v.shape(3);
  if (log_decay) {
    expect(*log_decay, "log_decay", "(batch, kv heads, seqlen)",
           {p.batch, p.num_kv_heads, p.seqlen});
    const ConstView view = view_of(*log_decay, name, "log_decay");
    p.log_decay = view.data;
    p.log_decay_stride_batch = view.stride_head;
    p.log_decay_stride_head = view.stride_seq;
    p.log_decay_stride_seq = view.stride_dim;
  }
  p.q = view_of(q, name, "q");
  p.k = view_of(k, name, "k");
  p.v = view_of(v, name, "v");
  p.normalize = normalize;
  p.eps = eps;
  py::array out(q.dtype(), {p.batch, p.num_heads, p.seqlen, p.headdim_v});
  p.out = out.mutable_data();
  const py::gil_scoped_release release;
  cpu::linear_attention_forward(p, 0, cpu::linear_attention_num_tasks(p));
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DIJIANG_VERSION;
  info["compiler"] = DIJIANG_COMPILER;
  const std::string cuda = DIJIANG_CUDA_VERSION;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["cuda_architectures"] = py::str(DIJIANG_CUDA_ARCHITECTURES).attr("split")(",");
  if (cuda.empty()) info["cuda_architectures"] = py::list();
  info["cpu_level"] = cpu::cpu_level();
  return info;
}

}  // namespace
}  // namespace dijiang

PYBIND11_MODULE(_core, m) {
  using namespace py::literals;
  m.doc() = "dijiang's CPU kernels on NumPy arrays, without torch.";
  m.attr("__version__") = DIJIANG_VERSION;
  m.def("cpu_level", &dijiang::cpu::cpu_level,
        "The x86-64 level of the kernels in use: 4 (AVX-512), 3 (AVX2), or 1.");
  m.def("build_info", &dijiang::build_info,
        "Version, compiler, CUDA version (None: a CPU build) and architectures, CPU level.");
  m.def("dct", &dijiang::dct, "x"_a, "type"_a = 2,
        "Orthonormal DCT (type 2 or 3) of the last dimension: (..., n) -> (..., n), float32 or "
        "float64.");
  m.def("linear_attention", &dijiang::linear_attention, "q"_a, "k"_a, "v"_a, py::kw_only(),
        "log_decay"_a = py::none(), "normalize"_a = true, "eps"_a = 0.0,
        "Causal linear attention of features q (batch, heads, seqlen, features), k (batch, kv "
        "heads, seqlen, features) and values v (batch, kv heads, seqlen, values); log_decay "
        "(batch, kv heads, seqlen), <= 0.");
}
