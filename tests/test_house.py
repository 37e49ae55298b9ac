"""The rules for source files that a program can check (CONTRIBUTING.md)."""

import ast
import re
import sys

import pytest
from openvla.publishing_openvla import FIRST_LINE
from reference import MODULES, REPOSITORY, module_name
from transformers.dynamic_module_utils import check_imports

SHIPPED = sorted(REPOSITORY.glob("*_openvla.py"))
ENTRIES = ("configuration_openvla", "modeling_openvla", "prismatic_openvla", "processing_openvla")
ALLOWED = {"torch", "numpy", "PIL", "transformers", "safetensors", "huggingface_hub"}
INSTALLED_ONLY = [path for path in MODULES if path not in SHIPPED]
MAX_SHIPPED_FILES = 15
MAX_SHIPPED_LINES = 4540


def imports(path):
    """Return the absolute top-level packages and the relative modules that a file imports, at any depth."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            (relative if node.level else absolute).add((node.module or "").split(".")[0])
    return absolute - set(sys.stdlib_module_names), relative


def test_few_files_are_shipped():
    """A copy beside a checkpoint cannot be repaired: it holds what loads a checkpoint and predicts, nothing else."""
    assert len(SHIPPED) <= MAX_SHIPPED_FILES, [path.name for path in SHIPPED]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SHIPPED) <= MAX_SHIPPED_LINES


@pytest.mark.lane
@pytest.mark.parametrize("path", SHIPPED, ids=module_name)
def test_shipped_files_need_nothing_but_the_core(path):
    check_imports(path)  # what transformers runs on every file that it fetches
    absolute, relative = imports(path)
    assert absolute <= ALLOWED
    assert relative <= {shipped.stem for shipped in SHIPPED}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_names_every_file_that_it_needs(entry):
    """Transformers up to 5.8 copies only the direct imports of the file that it loads from a local folder."""
    direct = imports(REPOSITORY / f"{entry}.py")[1]
    needed, left = set(), [entry]
    while left:
        for module in imports(REPOSITORY / f"{left.pop()}.py")[1] - needed:
            needed.add(module)
            left.append(module)
    assert direct == needed


@pytest.mark.parametrize("path", SHIPPED, ids=module_name)
def test_shipped_files_can_carry_a_digest(path):
    assert path.read_text(encoding="utf-8").count(FIRST_LINE) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=module_name)
def test_shipped_files_neither_assert_nor_print(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert)
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print")


@pytest.mark.parametrize("path", [*SHIPPED, *INSTALLED_ONLY], ids=module_name)
def test_nothing_is_unpickled(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(import|from) pickle\b|\bpickle\.", text)
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text))


@pytest.mark.parametrize("path", [*SHIPPED, *INSTALLED_ONLY], ids=module_name)
def test_tensors_are_written_by_torch(path):
    """The numpy writer of safetensors 0.8.0 stores arrays that are not C-contiguous wrongly (safetensors#825)."""
    assert not re.search(r"safetensors(\.|\s+import\s+)numpy", path.read_text(encoding="utf-8"))
