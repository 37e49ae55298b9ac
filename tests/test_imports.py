"""The modules' imports: no circle, downwards only, and nothing heavy before it is needed."""

import ast
import re
import subprocess
import sys

import pytest
from reference import MODULES, PACKAGE_FOLDERS, REPOSITORY, module_name

# Folders that the modules of a folder may import besides shipped modules, loading, tiny and their own folder.
ALLOWED = {
    "": set(),
    "adapters": set(),
    "inference": {"adapters"},
    "conversion": {"adapters"},
    "data": {"inference"},
    "training": {"adapters", "data", "inference", "conversion"},
    "serving": {"inference"},
    "evaluation": {"inference", "data"},
    "benchmarking": {"inference", "conversion"},
}
HEAVY = {"torch", "transformers", "numpy", "PIL", "huggingface_hub"}


def imported_modules(path):
    """Return the modules of this package that a module imports anywhere, by their names in the repository."""
    names, folder = set(), path.relative_to(REPOSITORY).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = "/".join([*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]).strip("/")
        candidates = [f"{base}/{alias.name}".strip("/") for alias in node.names] + [base]
        names |= {name for name in candidates if (REPOSITORY / f"{name}.py").is_file()}
    return names - {module_name(path)}


def graph():
    return {module_name(path): imported_modules(path) for path in MODULES if path.name != "__init__.py"}


def test_imports_have_no_circle():
    left = graph()
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("folder", PACKAGE_FOLDERS)
def test_a_folder_imports_only_the_folders_below_it(folder):
    for name, needed in graph().items():
        if name.startswith(f"{folder}/"):
            others = {other.split("/")[0] for other in needed if "/" in other} - {folder}
            assert others <= ALLOWED[folder], name


def test_shipped_modules_import_no_folder():
    for name, needed in graph().items():
        if name.endswith("_openvla"):
            assert all(other.endswith("_openvla") for other in needed), name


def test_every_folder_of_modules_is_packaged():
    listed = set(re.findall(r'"openvla\.([a-z]+)"[,\n]', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")))
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert folders == listed == set(PACKAGE_FOLDERS)


def modules_after(code):
    """Return the top-level modules that are imported after some code ran in a process of its own."""
    code += "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import openvla",
        "from openvla.__main__ import build_parser; build_parser(None).format_help()",
        "import sys\nsys.argv = ['openvla', '--version']\nimport runpy\n"
        "try: runpy.run_module('openvla', run_name='__main__')\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "version"],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    assert modules_after(code) & HEAVY == set()


def test_the_client_needs_neither_torch_nor_transformers():
    assert modules_after("from openvla import PolicyClient") & HEAVY <= {"numpy", "PIL"}


@pytest.mark.lane
@pytest.mark.parametrize(
    "code",
    [
        "import openvla\nimport transformers",
        "import transformers\nimport openvla",
        "import openvla.tiny\nimport transformers",
        "from openvla import PolicyClient, load_policy\nimport transformers",
    ],
    ids=["before", "after", "submodule", "names"],
)
def test_auto_classes_know_the_models_whatever_is_imported_first(code):
    code += "\nassert type(transformers.AutoConfig.for_model('openvla')).__module__ == 'openvla.configuration_openvla'"
    code += "\nassert not any('Watcher' in type(finder).__name__ for finder in __import__('sys').meta_path)"
    modules_after(code)


def test_finding_transformers_does_not_register_yet():
    code = "import openvla, importlib.util\nassert importlib.util.find_spec('transformers') is not None"
    assert "torch" not in modules_after(code)
    code += "\nimport transformers\ntransformers.AutoConfig.for_model('openvla')"
    modules_after(code)
