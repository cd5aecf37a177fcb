"""What is packaged, what the compiled libraries ask of torch, and what a failed build says."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import dijiang
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path(dijiang.__file__).parent
FOLDERS = ("cmake", "csrc", "include", "python")
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, libraries of an earlier build included."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (folder / "python" / "dijiang" / "dijiang_ops.so").touch()
    return folder


def setup(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def test_sdist_holds_what_the_build_needs_and_nothing_else(source, tmp_path):
    done = setup(source, "-q", "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = [pathlib.PurePath(m.name) for m in archive.getmembers() if m.isfile()]
    held = {str(path.relative_to(path.parts[0])) for path in files}
    wanted = {*FILES, "PKG-INFO", "setup.cfg"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            made = path.suffix in (".so", ".pyc") or "egg-info" in str(path)
            if path.is_file() and not made:
                wanted.add(str(path.relative_to(ROOT)))
    assert {name for name in held if "egg-info" not in name} == wanted


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_no_compiler_fails_with_words(source, tmp_path):
    done = setup(
        source, "build_ext", CXX="/nowhere/c++", DIJIANG_BUILD_DIR=str(tmp_path), CMAKE_ARGS=""
    )
    assert done.returncode and "Traceback" not in done.stderr
    assert "They need a C++17 compiler" in done.stderr


def test_no_cmake_fails_with_words(source, tmp_path):
    done = setup(source, "build_ext", PATH="", DIJIANG_BUILD_DIR=str(tmp_path))
    assert done.returncode and "Traceback" not in done.stderr
    assert "no cmake on PATH" in done.stderr and "pip install cmake" in done.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize("name", ["dijiang_ops.so", "dijiang_ops_cuda.so"])
def test_operators_use_the_stable_abi_alone(name):
    """No symbol of at::, c10:: or torch::, which change with torch, and none of Python's."""
    if not (PACKAGE / name).exists():
        pytest.skip(f"{name} is not built")
    nm = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(PACKAGE / name)]
    symbols = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    tied = re.compile(r"_?Py|_Z\w*?(2at|3c10|5torch)\d")
    assert [symbol for symbol in symbols if tied.match(symbol)] == []


def test_workflows_call_what_exists():
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow[True] and workflow["jobs"], path.name  # YAML 1.1 reads `on` as true
        for job in workflow["jobs"].values():
            assert job["steps"] and "timeout-minutes" in job
        for script in re.findall(r"(?:\.ci|tools)/[\w./]+", path.read_text()):
            assert (ROOT / script).exists(), f"{path.name}: {script}"


def test_changelog_has_this_version():
    assert f"## {dijiang.__version__}" in (ROOT / "CHANGELOG.md").read_text()
