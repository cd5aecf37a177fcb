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


class CMakeBuild(build_ext):
    def run(self):
        version = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / (os.environ.get("DIJIANG_BUILD_DIR") or f"build/{version}")
        prefix = ROOT / "python" if self.inplace or self.editable_mode else Path(self.build_lib)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DDIJIANG_TESTS=OFF"]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
        cmake = shutil.which("cmake") or sys.exit("cmake is missing: pip install cmake ninja")
        subprocess.check_call(
            [cmake, "-S", str(ROOT), "-B", str(build), *generator, *options, *extra]
        )
        subprocess.check_call(
            [cmake, "--build", str(build), "--target", "python_libraries", "-j", jobs]
        )
        subprocess.check_call(
            [cmake, "--install", str(build), "--component", "python", "--prefix", str(prefix)]
        )


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_ext": CMakeBuild}, distclass=BinaryDistribution)
