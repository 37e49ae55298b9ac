"""Task suites of the simulator: tasks, instructions, episode lengths; with the simulator, too (``-m libero``)."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from openvla import Policy
from openvla.evaluation import cli, simulator
from openvla.evaluation import libero as evaluation
from openvla.tiny import build_tiny

pytestmark = pytest.mark.usefixtures("renderer")


def test_parse_tasks_by_number_and_instruction():
    instructions = ["pick up the milk", "pick up the butter", "pick up the butter knife"]
    suite = SimpleNamespace(n_tasks=3, get_task=lambda index: SimpleNamespace(language=instructions[index]))
    assert simulator.parse_tasks(None, suite) == [0, 1, 2]
    assert simulator.parse_tasks(["2", "milk", 0, "pick_up_the_butter"], suite) == [2, 0, 1]
    with pytest.raises(ValueError, match=r"(?s)Unknown task 'soup'.*0  pick up the milk"):
        simulator.parse_tasks(["soup"], suite)
    with pytest.raises(ValueError, match=r"More than one \(2\) fits task 'butter'"):
        simulator.parse_tasks(["butter"], suite)
    with pytest.raises(ValueError, match="Unknown task '3'"):
        simulator.parse_tasks([3], suite)


BDDL = """; a comment with (:language not this one)
(define (problem LIBERO_Floor_Manipulation)
  (:domain robosuite)
  (:language {words})
  (:regions (bin_region (:target floor) (:ranges ((-0.01 0.25 0.01 0.27)))))
  (:goal (And (In butter_1 basket_1_contain_region)))
)
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Pick the butter and place it in the basket", "pick the butter and place it in the basket"),
        ("grab  milk\n    and put into basket ", "grab milk and put into basket"),
        ("open the cabinet’s middle drawer ; a comment", None),
        ("", None),
        ("one) (:language two", None),
    ],
)
def test_bddl_instruction(words, expected):
    if expected:
        assert simulator.bddl_instruction(BDDL.format(words=words)) == expected
        return
    with pytest.raises(ValueError, match=r"milk.bddl must hold one \(:language"):
        simulator.bddl_instruction(BDDL.format(words=words), "milk.bddl")


class Task(NamedTuple):
    """LIBERO's task."""

    name: str
    language: str
    problem_folder: str
    bddl_file: str


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """A registry of suites with different instructions for one task, without the simulator."""
    instructions = {
        "libero_object": "Pick the milk",
        "libero_object_lan": "grab milk",
        "libero_object_task": "Pick the butter",
    }
    for suite, instruction in instructions.items():
        (tmp_path / suite).mkdir()
        (tmp_path / suite / "pick_up_the_milk.bddl").write_text(BDDL.format(words=instruction), encoding="utf-8")

    def make_suite(name, count=1):
        task = Task("pick_up_the_milk", "pick up the milk", name, "pick_up_the_milk.bddl")
        tasks = [task] * count
        return lambda: SimpleNamespace(tasks=tasks, n_tasks=count)

    suites = {name: make_suite(name) for name in [*instructions, "libero_object_env"]} | {
        "libero_100": make_suite("x", 0)
    }
    module = SimpleNamespace(get_benchmark_dict=lambda: suites, get_libero_path=lambda kind: str(tmp_path))
    monkeypatch.setattr(simulator, "require_libero", lambda name="libero.libero.benchmark": module)


@pytest.mark.parametrize(
    ("suite", "source", "instruction"),
    [
        ("libero_object", "file name", "pick up the milk"),  # as in training; its BDDL file differs
        ("libero_object_lan", "BDDL", "grab milk"),
        ("libero_object_task", "BDDL", "pick the butter"),
    ],
)
def test_perturbed_suites_use_bddl_instructions(suite, source, instruction, libero):
    assert simulator.instruction_source(suite) == source
    assert [task.language for task in simulator.open_suite(suite).tasks] == [instruction]


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("libero_object_env", r"libero_object_env cannot be run.*lacks its file .*pick_up_the_milk.bddl; take another"),
        ("libero_100", "libero_100 has no tasks in the installed LIBERO; take another suite"),
        ("libero_objekt", "Unknown suite 'libero_objekt'. Did you mean 'libero_object'"),
    ],
)
def test_suite_without_files_or_tasks_is_rejected(suite, message, libero):
    with pytest.raises(ValueError, match=message):
        simulator.open_suite(suite)


def test_perturbed_suites_have_the_step_limit_of_the_plain_ones():
    harness = pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    steps = {
        "libero_10": 520, "libero_10_lan": 520, "libero_goal_task": 300, "libero_object_with_mug": 280,
        "libero_spatial": 220, "libero_spatial_swap": 220, "libero_90": 400, "libero_mine": 300,
    }  # fmt: skip
    assert {name: harness.LiberoSuite(name, [0]).get_metadata()["max_steps"] for name in steps} == steps

    def reported(suite, max_steps=None):
        return evaluation._max_episode_steps(SimpleNamespace(suite=suite, tasks=[0], max_steps=max_steps))

    assert {name: reported(name) for name in steps} == steps
    assert reported("libero_10_lan", max_steps=7) == 7


@pytest.mark.libero
def test_instructions_equal_the_simulators():
    """BDDL instructions equal those that the simulator parses; plain suites have those of the file names."""
    parse = simulator.require_libero("libero.libero.envs.bddl_utils").get_problem_info
    registered = simulator.require_libero().get_benchmark_dict()
    opened = []
    for name, suite_class in registered.items():
        try:
            suite = simulator.open_suite(name)
        except ValueError:  # no files; the suites that must have them are below
            continue
        opened.append(name)
        for named, task in zip(suite_class().tasks, suite.tasks):
            from_bddl = parse(str(simulator.bddl_file(task)))["language_instruction"]
            assert task.language == (named.language if name in simulator.PLAIN_SUITES else from_bddl)
            assert task == named._replace(language=task.language)
            if name.endswith(("_lan", "_task")):
                assert task.language != named.language
    kinds = ("lan", "task", "swap", "object")
    perturbed = {f"libero_{suite}_{kind}" for suite in ("object", "spatial", "goal", "10") for kind in kinds}
    assert perturbed <= set(opened)
    assert set(simulator.PLAIN_SUITES) - {"libero_100"} <= set(opened)


@pytest.mark.libero
def test_perturbed_suite_is_evaluated_with_bddl_instructions(tmp_path):
    """The policy gets the BDDL instruction through the harness, and the report has it."""
    instructions = set()

    class StillPolicy(Policy):
        def act(self, image, instruction, proprio=None):
            instructions.add(instruction)
            return np.array([0, 0, 0, 0, 0, 0, 1.0])

    model, processor = build_tiny(norm_stats={"mine": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}})
    report = evaluation.evaluate_libero(
        StillPolicy(model, processor, "mine"),
        suite="libero_object_task",
        tasks=["butter"],
        episodes=1,
        max_steps=2,
        output=tmp_path,
        progress=False,
    )
    assert instructions == {report["results"][0]["instruction"]} == {"pick the butter and place it in the basket"}
    assert (report["instruction_source"], report["max_steps"]) == ("BDDL", 2)
    assert re.search(r"instruction_source +BDDL", cli.format_report(report, tmp_path))
