"""Check every name of other libraries that this package relies on; a missing one fails under its own name."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from library_surface import CACHE, ROOT, SURFACE
from reference import MODULES, module_name

pytestmark = pytest.mark.lane

SOURCES = MODULES
BRIDGES = {"compatibility_openvla.py", "activation_checkpointing.py"}
# Private names that are not unstable names of another library: (pattern, reason).
NOT_LIBRARY = (
    (r"_cuda_graphs", "an attribute that inference/cuda_graphs.py sets on a model"),
    (r"_exit", "os._exit of Python's own library, which documents it"),
    (r"_replace", "NamedTuple._replace of Python's own library, which documents it"),
)
# Deprecated; only compatibility_openvla.py may use them.
DEPRECATED = {"gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing"}
PROVEN = [touch for touch in SURFACE if touch.renamed]
# Renamed in every run; the others take minutes.
ALWAYS = ("PretrainedConfig._attn_implementation", f"ModelOutput.{CACHE}")


def is_private(name):
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z0-9]\w*", name) is not None


def nodes():
    """Yield every file and node of the package."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def attribute_strings(node):
    """Return the attribute name in a call of getattr, hasattr, setattr or delattr."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if not is_call or node.func.id not in ("getattr", "hasattr", "setattr", "delattr") or len(node.args) < 2:
        return []
    return [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []


def defined():
    """Return the names that the package defines: functions, classes, variables, arguments, attributes of self."""
    names = set()
    for _, node in nodes():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def lacks_a_listed_name(error):
    """Return whether an import failed because transformers lacks a listed name, which another check reports."""
    missing = re.match(r"cannot import name '(\w+)' from 'transformers", str(error))
    return missing is not None and missing[1] in {touch.name for touch in SURFACE if touch.library == "transformers"}


@pytest.mark.parametrize("touch", SURFACE, ids=lambda touch: touch.name)
def test_the_library_still_has(touch):
    if importlib.util.find_spec(touch.library) is None:
        pytest.skip(f"{touch.library} is not installed")
    try:
        touch.check()
    except Exception as error:
        if touch.library != "transformers" and lacks_a_listed_name(error):
            pytest.skip(f"{touch.library} cannot be imported with this transformers: {error}")
        folder = Path(importlib.util.find_spec(touch.library).origin).parent
        version = f"{touch.library} {importlib.metadata.version(touch.library)} in {folder}"
        pytest.fail(
            f"{touch.name} has changed: {version}. Seen: {touch.seen}. ({type(error).__name__}: {error})\n"
            f"Change to make: {touch.change}",
            pytrace=False,
        )


def test_touches_have_unique_names_and_existing_files():
    names = [touch.name for touch in SURFACE]
    assert len(set(names)) == len(names)
    assert {file for touch in SURFACE for file in touch.used_in} <= {f"{module_name(path)}.py" for path in SOURCES}


def test_every_private_name_is_listed():
    listed = {part for touch in SURFACE for part in re.split(r"\W+", touch.name)}
    listed |= {touch.renamed[0] for touch in PROVEN}
    # Names in other versions than the installed one.
    listed |= {word for touch in SURFACE for word in re.findall(r"\w+", touch.seen)}
    package_names, missing = defined(), set()
    for path, node in nodes():
        used = attribute_strings(node)
        if isinstance(node, ast.Attribute):
            used.append(node.attr)
        elif isinstance(node, ast.Call):
            used += [keyword.arg for keyword in node.keywords]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used += [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            used += [part for alias in node.names for part in alias.name.split(".")]
        for name in filter(is_private, used):
            known = (
                name in package_names
                or name in listed
                or any(re.fullmatch(pattern, name) for pattern, _ in NOT_LIBRARY)
            )
            if not known:
                missing.add(f"{name} ({path.name}, line {node.lineno})")
    assert not missing, f"List in SURFACE (tests/library_surface.py), with a check each: {sorted(missing)}"


def test_deprecated_names_are_used_in_the_compatibility_module_only():
    uses = []
    for path, node in nodes():
        used = set(attribute_strings(node))
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Call):
            used |= {keyword.arg for keyword in node.keywords}
        if path.name not in BRIDGES and used & (DEPRECATED | {"past_key_values"}):
            uses.append(f"{path.name}, line {node.lineno}: {used & (DEPRECATED | {'past_key_values'})}")
    assert not uses, f"Use the name that one of {sorted(BRIDGES)} has for it: {uses}"


def link(source, target):
    """Link a file to a second path; copy it where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Link the installed transformers into a folder that is imported from first; return both folders."""
    original = Path(importlib.util.find_spec("transformers").origin).parent
    folder = tmp_path_factory.mktemp("renamed")
    shutil.copytree(original, folder / "transformers", copy_function=link)
    return original, folder


def rewrite(path, old, new):
    """Replace a link by a file with a renamed identifier; the original is unchanged. Return whether it occurred."""
    text = path.read_text(encoding="utf-8")
    changed = re.sub(rf"\b{re.escape(old)}\b", new, text)
    if changed == text:
        return False
    temporary = path.with_suffix(".tmp")
    temporary.write_text(changed, encoding="utf-8")
    os.replace(temporary, path)
    return True


@pytest.mark.parametrize(
    "touch",
    [pytest.param(touch, marks=[] if touch.name in ALWAYS else pytest.mark.surface) for touch in PROVEN],
    ids=lambda touch: touch.name,
)
def test_renamed_attribute_fails_its_own_check_only(touch, copied, tmp_path):
    original, folder = copied
    copy = folder / "transformers"
    identifier, files = touch.renamed
    changed = [path for path in sorted(copy.glob(files)) if rewrite(path, identifier, f"{identifier}_renamed")]
    if not changed:
        pytest.skip(f"this transformers has no {identifier}; seen: {touch.seen}")
    try:
        report = tmp_path / "report.xml"
        options = ["-q", "-k", "still_has", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(Path(__file__))],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    finally:
        for path in changed:
            path.unlink()
            link(original / path.relative_to(copy), path)
    assert report.is_file(), run.stdout + run.stderr
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    messages = {case.get("name"): case.findtext("failure") or case.findtext("error") for case in cases}
    failed = {name: message for name, message in messages.items() if message is not None}
    assert list(failed) == [f"test_the_library_still_has[{touch.name}]"], run.stdout[-3000:]
    assert len(messages) == len(SURFACE)
    (message,) = failed.values()
    assert touch.change in message
    assert f"in {copy}." in message  # the copy was imported, not the installed one
