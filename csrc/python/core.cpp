// The Python module dijiang._core: build facts (and, in their own files, NumPy entry points).
#include <pybind11/pybind11.h>

#include "cpu/cpu_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "dijiang's kernels on NumPy arrays, without torch";
  m.attr("__version__") = DIJIANG_VERSION;
  m.def("cpu_level", &dijiang::cpu::cpu_level,
        "The x86-64 level of the kernels in use: 4 (AVX-512), 3 (AVX2), or 1.");
}
