// The Python module dijiang._core: build facts (and, in their own files, NumPy entry points).
#include <pybind11/pybind11.h>

#include "cpu/cpu_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "dijiang's kernels on NumPy arrays, without torch";
  m.attr("__version__") = DIJIANG_VERSION;
  m.def("cpu_level", &dijiang::cpu::cpu_level,
        "Instruction set in use: 'x86-64-v4', 'x86-64-v3' or 'baseline'.");
}
