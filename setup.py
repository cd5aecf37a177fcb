"""Drives CMake: configure, build, and install the libraries into the package. See CMakeLists.txt.

Environment: CMAKE_ARGS, extra arguments for CMake (e.g. "-DDIJIANG_CUDA=OFF"); DIJIANG_BUILD_DIR,
the build folder (default build/cp3XY).
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILED = """
dijiang: the kernels were not built: {}.
They need a C++17 compiler (Debian: apt-get install g++ python3-dev), CMake 3.24 or newer
(pip install cmake ninja) and torch 2.10 or newer; see docs/building.md."""


class CMakeBuild(build_ext):
    def run(self):
        version = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / (os.environ.get("DIJIANG_BUILD_DIR") or f"build/{version}")
        prefix = ROOT / "python" if self.inplace or self.editable_mode else Path(self.build_lib)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # Without torch a package would be built that lacks its operators.
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DDIJIANG_TESTS=OFF",
            "-DDIJIANG_TORCH=ON",
        ]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
        # It would keep an earlier build's options, and that a compiler was not found.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake("-S", str(ROOT), "-B", str(build), *generator, *options, *extra)
        cmake("--build", str(build), "--target", "python_libraries", "-j", jobs)
        for library in (prefix / "dijiang").glob("*.so"):
            library.unlink()  # an earlier build may have made more of them
        cmake("--install", str(build), "--component", "python", "--prefix", str(prefix))


def cmake(*arguments):
    program = shutil.which("cmake") or sys.exit(FAILED.format("there is no cmake on PATH"))
    if subprocess.call([program, *arguments]):
        sys.exit(FAILED.format("cmake failed, as said above"))


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_ext": CMakeBuild}, distclass=BinaryDistribution)
