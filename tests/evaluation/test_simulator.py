"""The simulator's suites: whose words tell a task, how long an episode lasts; also (``-m libero``) the real ones."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from openvla import Policy
from openvla.evaluation import libero as rollout
from openvla.evaluation import simulator
from openvla.tiny import build_tiny

pytestmark = pytest.mark.usefixtures("renderer")


def test_tasks_by_number_and_name():
    spoken = ["pick up the milk", "pick up the butter", "pick up the butter knife"]
    suite = SimpleNamespace(n_tasks=3, get_task=lambda index: SimpleNamespace(language=spoken[index]))
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
def test_a_bddl_files_instruction(words, expected):
    if expected:
        assert simulator.bddl_instruction(BDDL.format(words=words)) == expected
        return
    with pytest.raises(ValueError, match=r"milk.bddl must hold one \(:language"):
        simulator.bddl_instruction(BDDL.format(words=words), "milk.bddl")


class Task(NamedTuple):
    """As LIBERO has it."""

    name: str
    language: str
    problem_folder: str
    bddl_file: str


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """LIBERO's registry with four suites that word one task in four ways, and no simulator."""
    words = {
        "libero_object": "Pick the milk",
        "libero_object_lan": "grab milk",
        "libero_object_task": "Pick the butter",
    }
    for suite, spoken in words.items():
        (tmp_path / suite).mkdir()
        (tmp_path / suite / "pick_up_the_milk.bddl").write_text(BDDL.format(words=spoken), encoding="utf-8")

    def suite_of(name, count=1):
        task = Task("pick_up_the_milk", "pick up the milk", name, "pick_up_the_milk.bddl")
        tasks = [task] * count
        return lambda: SimpleNamespace(tasks=tasks, n_tasks=count)

    suites = {name: suite_of(name) for name in [*words, "libero_object_env"]} | {"libero_100": suite_of("x", 0)}
    module = SimpleNamespace(get_benchmark_dict=lambda: suites, get_libero_path=lambda kind: str(tmp_path))
    monkeypatch.setattr(simulator, "require_libero", lambda name="libero.libero.benchmark": module)


@pytest.mark.parametrize(
    ("suite", "source", "told"),
    [
        ("libero_object", "file name", "pick up the milk"),  # as trained, although its BDDL file says otherwise
        ("libero_object_lan", "BDDL", "grab milk"),
        ("libero_object_task", "BDDL", "pick the butter"),
    ],
)
def test_perturbed_suites_are_told_in_their_own_words(suite, source, told, libero):
    assert simulator.instruction_source(suite) == source
    assert [task.language for task in simulator.open_suite(suite).tasks] == [told]


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("libero_object_env", r"libero_object_env cannot be run.*lacks its file .*pick_up_the_milk.bddl; take another"),
        ("libero_100", "libero_100 has no tasks in the installed LIBERO; take another suite"),
        ("libero_objekt", "Unknown suite 'libero_objekt'. Did you mean 'libero_object'"),
    ],
)
def test_suites_that_cannot_be_run(suite, message, libero):
    with pytest.raises(ValueError, match=message):
        simulator.open_suite(suite)


def test_a_perturbed_suites_episodes_last_as_long_as_the_plain_ones():
    harness = pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    steps = {
        "libero_10": 520, "libero_10_lan": 520, "libero_goal_task": 300, "libero_object_with_mug": 280,
        "libero_spatial": 220, "libero_spatial_swap": 220, "libero_90": 400, "libero_mine": 300,
    }  # fmt: skip
    assert {name: harness.LiberoSuite(name, [0]).get_metadata()["max_steps"] for name in steps} == steps
    reported = {name: rollout._episode_steps({"suite": name, "tasks": [0], "max_steps": None}) for name in steps}
    assert reported == steps
    assert rollout._episode_steps({"suite": "libero_10_lan", "tasks": [0], "max_steps": 7}) == 7


@pytest.mark.libero
def test_every_suite_is_told_in_the_words_it_was_made_with():
    """What the simulator itself reads out of the BDDL file; the file's name in suites that policies are trained on."""
    parse = simulator.require_libero("libero.libero.envs.bddl_utils").get_problem_info
    registered = simulator.require_libero().get_benchmark_dict()
    run = []
    for name, suite_class in registered.items():
        try:
            suite = simulator.open_suite(name)
        except ValueError:  # no files; below stands which ones must have them
            continue
        run.append(name)
        for named, task in zip(suite_class().tasks, suite.tasks):
            of_file = parse(str(simulator.bddl_file(task)))["language_instruction"]
            assert task.language == (named.language if name in simulator.PLAIN_SUITES else of_file)
            assert task == named._replace(language=task.language)
            if name.endswith(("_lan", "_task")):
                assert task.language != named.language
    kinds = ("lan", "task", "swap", "object")
    perturbed = {f"libero_{suite}_{kind}" for suite in ("object", "spatial", "goal", "10") for kind in kinds}
    assert perturbed <= set(run)
    assert set(simulator.PLAIN_SUITES) - {"libero_100"} <= set(run)


@pytest.mark.libero
def test_a_perturbed_suite_is_judged_by_its_own_words(tmp_path, capsys):
    """The policy, in the harness and over its connection, is told what the BDDL file says; so does the report."""
    told = set()

    class Still(Policy):
        def act(self, image, instruction, proprio=None):
            told.add(instruction)
            return np.array([0, 0, 0, 0, 0, 0, 1.0])

    model, processor = build_tiny(norm_stats={"mine": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}})
    report = rollout.evaluate_libero(
        Still(model, processor, "mine"),
        suite="libero_object_task",
        tasks=["butter"],
        episodes=1,
        max_steps=2,
        output=tmp_path,
        progress=False,
    )
    assert told == {report["results"][0]["instruction"]} == {"pick the butter and place it in the basket"}
    assert (report["instructions"], report["max_steps"]) == ("BDDL", 2)
    assert "instructions  BDDL" in rollout.as_table(report, tmp_path)
