"""The scripted oracle of examples/collect_libero.py and its disturbances, in a world of points."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from reference import REPOSITORY

pytest.importorskip("pyarrow")
collector = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "examples" / "collect_libero.py")))
METRES = 0.02  # a command of 1 moves the hand so far in one step
FRAME = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)  # what its camera sees, whatever happens
WITHIN = np.array([0.02, 0.02, 0.02])  # of the thing the fingers hold it


class World:
    """A hand, an object on a table and a basket; a grasped object moves with the hand, otherwise it falls."""

    def __init__(self, hand, thing):
        self.hand, self.thing, self.basket = np.array(hand), np.array(thing), np.array([0.0, 0.26, 0.0])
        self.table, self.closed = self.thing[2], False

    def observe(self):
        observation = {
            "robot0_eef_pos": self.hand,
            "thing_pos": self.thing,
            "basket_pos": self.basket,
            "top_image": FRAME,
        }
        return {name: value.copy() for name, value in observation.items()}

    def step(self, command):
        held = self.closed and (np.abs(self.hand - self.thing) < WITHIN).all()
        move = command[:3] * METRES
        self.hand = self.hand + move
        self.thing = self.thing + move if held else np.array([*self.thing[:2], self.table])
        self.closed = command[6] == collector.CLOSE

    def is_done(self):
        return not self.closed and np.linalg.norm((self.thing - self.basket)[:2]) < 0.05


def run(world, oracle, disturbance, steps=300):
    """Return the stored commands until the object is in the basket."""
    stored = []
    while not world.is_done():
        assert len(stored) < steps
        command, label, harmless = oracle.act(world.observe())
        stored.append(label)
        world.step(disturbance.executed(command, harmless, world.observe()))
    return np.stack(stored)


@pytest.mark.parametrize("seed", range(5))
def test_oracle_places_the_object_with_and_without_disturbance(seed):
    for disturbance in (collector.Undisturbed(), collector.Pushes(np.random.default_rng(seed))):
        world = World([-0.1, 0.0, 0.3], [0.05, -0.1, 0.05])
        stored = run(world, collector.Oracle("thing", "basket", np.random.default_rng(seed)), disturbance)
        assert set(np.abs(stored[:, :3]).round(6).flat) <= set(collector.SPEEDS)
        assert set(stored[:, 6]) == {collector.OPEN, collector.CLOSE}


def test_policy_acts_first_and_oracle_commands_are_stored():
    calls = []

    class Away:
        model = SimpleNamespace(config=SimpleNamespace(chunk_length=1))

        def act(self, image, instruction):
            calls.append((image, instruction))
            return np.array([-1.0, 0, 0, 0, 0, 0, 0.0])  # OpenVLA's convention: closed

    driven = collector.Driven(Away(), "pick it up", ["top"], np.random.default_rng(0))
    driven.left, commands = 3, np.eye(7)[:5]
    executed = [driven.executed(command, True, {"top_image": FRAME}) for command in commands]
    np.testing.assert_array_equal(executed[:3], [[-1, 0, 0, 0, 0, 0, collector.CLOSE]] * 3)
    np.testing.assert_array_equal(executed[3:], commands[3:])
    assert [instruction for _, instruction in calls] == ["pick it up"] * 3
    np.testing.assert_array_equal(calls[0][0], FRAME[::-1, ::-1])

    world, driven.left = World([-0.1, 0.0, 0.3], [0.05, -0.1, 0.05]), 20
    stored = run(world, collector.Oracle("thing", "basket", np.random.default_rng(0)), driven)
    assert (stored[:20, 0] > 0).all()  # the way back, while the policy went the other way
    assert (stored[:20, 6] == collector.OPEN).all()


def test_chunk_policy_is_called_once_per_chunk():
    calls = []

    class Chunks:
        model = SimpleNamespace(config=SimpleNamespace(chunk_length=2))

        def act(self, image, instruction, proprio):
            calls.append(image)
            return np.arange(1, 3)[:, None] * np.array([0.1, 0, 0, 0, 0, 0, 0.25]) * len(calls)

    driven = collector.Driven(Chunks(), "pick it up", ["top"], np.random.default_rng(0))
    driven.left = 3
    executed = [driven.executed(np.eye(7)[1], True, {"top_image": FRAME}) for _ in range(4)]
    np.testing.assert_allclose([action[0] for action in executed], [0.1, 0.2, 0.2, 0])
    assert len(calls) == 2


def test_oracle_continues_with_an_object_that_the_policy_grasped():
    """The policy's grasp is off center, unlike the oracle's."""
    world = World([0.065, -0.1, 0.10], [0.05, -0.1, 0.05])
    oracle = collector.Oracle("thing", "basket", np.random.default_rng(0))
    assert oracle.act(world.observe())[1][6] == collector.OPEN
    world.thing, world.closed = np.array([0.05, -0.1, 0.09]), True
    stored = run(world, oracle, collector.Undisturbed())
    first_open = int(np.argmax(stored[:, 6] == collector.OPEN))
    assert first_open > 5
    assert np.linalg.norm((world.thing - world.basket)[:2]) < 0.05
