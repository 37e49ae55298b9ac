"""Consistency of .github/ and of other files at the root with the files, commands and versions that they name."""

import re

import openvla
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from reference import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(*parts):
    return REPOSITORY.joinpath(*parts).read_text(encoding="utf-8")


def workflow(name):
    return yaml.safe_load(read(".github", "workflows", name))


def commands(workflow):
    """Return all shell steps of a workflow as one text."""
    return "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])


def default_lanes():
    """Return the default words of a variable in ``ci/lanes.sh``, written ``name=${NAME:-these words}``."""
    lists = dict(re.findall(r"^(\w+)=\$\{\w+:?-([^}]*)\}", read("ci", "lanes.sh"), re.MULTILINE))
    return set(f"{lists['lanes']} {lists['other_lanes']}".split())


def test_all_workflows_exist():
    assert {path.stem for path in WORKFLOWS} >= {"tests", "lint", "docs", "lanes", "latest", "release"}


def test_the_tests_run_on_every_supported_python():
    """Versions are strings: YAML reads an unquoted 3.10 as 3.1."""
    matrix = workflow("tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    supported = SpecifierSet(re.search(r'^requires-python = "(.*)"', read("pyproject.toml"), re.MULTILINE)[1])
    assert matrix[: len(PYTHONS)] == PYTHONS
    assert all(version in supported for version in matrix)
    assert [f"3.{minor}" for minor in range(14) if f"3.{minor}" in supported] == PYTHONS


def test_every_lane_runs_somewhere():
    lanes = workflow("lanes.yml")["jobs"]["lane"]["strategy"]["matrix"]["lane"]
    daily = re.findall(r"ci/lane\.sh ([\w.-]+)", commands(workflow("latest.yml")))
    assert set(lanes) <= default_lanes()
    assert set(lanes) | set(daily) == default_lanes()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_of_workflows_exist(path):
    text = commands(yaml.safe_load(path.read_text(encoding="utf-8")))
    for target in re.findall(r"\bmake ([\w-]+)", text):
        assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target
    for script in re.findall(r"\bbash (\S+)", text):
        assert (REPOSITORY / script).is_file(), script


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_read_only_and_have_a_timeout(path):
    """A job with more permissions sets them itself and does not check out the repository's code."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        if "permissions" in job:
            assert not any("checkout" in step.get("uses", "") for step in job["steps"]), name


def test_citation_has_the_current_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == openvla.__version__


@pytest.mark.parametrize("name", ["bug.yml", "checkpoint.yml"])
def test_issue_forms_ask_for_versions_and_link_existing_files(name):
    form = yaml.safe_load(read(".github", "ISSUE_TEMPLATE", name))
    fields = {field.get("id"): field["attributes"] for field in form["body"]}
    for package in ("openvla", "transformers", "torch", "Pillow", "peft"):
        assert f"{package}:" in fields["versions"]["value"]
    for file in re.findall(r"`([\w/]+\.md)`", fields[None]["value"]):
        assert (REPOSITORY / file).is_file(), file


@pytest.mark.parametrize("name", ["SECURITY.md", ".github/pull_request_template.md"])
def test_linked_files_exist(name):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", read(name)):
        assert (REPOSITORY / link).is_file(), link
