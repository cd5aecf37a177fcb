"""Every family of models does what the README's table says it does, or is refused by name."""

import os
import pathlib
import subprocess
import sys

import dijiang
import families
import pytest
import transformers

ROOT = pathlib.Path(__file__).parent.parent
#: The oldest transformers that works, beside the one installed: tools/setup.sh puts it there.
OLDEST = ROOT / ".venv" / "oldest-transformers"


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(name):
    row = families.committed().get(name, {})
    if row.get("refused"):
        model = families.family(name)
        names = set(model.state_dict())
        with pytest.raises(dijiang.ConversionError) as refused:
            dijiang.convert(model, families.CONFIG)
        assert f"{type(model).__name__} cannot be converted: {row['refused']}" in str(refused.value)
        assert set(model.state_dict()) == names and not dijiang.is_converted(model)
        return
    for behaviour in families.BEHAVIOURS:
        assert row.get(behaviour, "yes") == "yes", f"{name}, {behaviour}: the table says no"
        families.check(name, behaviour)


def test_the_installed_transformers_has_a_table():
    if not families.committed():
        pytest.skip(f"transformers {transformers.__version__} is not one of the table's")
    assert set(families.committed()) == set(families.FAMILIES)


def test_oldest_transformers():
    """The same table, and generation, with the oldest transformers that is supported."""
    if not OLDEST.is_dir():
        pytest.skip(f"no {OLDEST.relative_to(ROOT)}: tools/setup.sh installs it")
    files = ("test_families.py", "test_generate.py", "test_save.py")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
            "--deselect", "tests/test_families.py::test_oldest_transformers",
            *(f"tests/{file}" for file in files),
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(OLDEST)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
