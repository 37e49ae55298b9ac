"""Playing chunks: open loop, blended, late answers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openvla import ActionChunk


class Counter:
    """Answers with chunks whose numbers say when they were asked and which action they are: 10 * call + index."""

    def __init__(self, length=4):
        self.length, self.calls, self.last = length, 0, None

    def act(self, image, instruction, proprio=None):
        self.calls, self.last = self.calls + 1, (image, instruction, proprio)
        return 10.0 * self.calls + np.arange(self.length)[:, None] + np.zeros((1, 2))


def play(player, count):
    return [player.act("image", "go", [0.5])[0] for _ in range(count)]


def test_open_loop():
    policy = Counter()
    player = ActionChunk(policy, steps=3)
    assert play(player, 7) == [10, 11, 12, 20, 21, 22, 30]
    assert policy.last == ("image", "go", [0.5])
    assert play(ActionChunk(Counter()), 5) == [10, 11, 12, 13, 20]


def test_a_new_episode_asks_again():
    player = ActionChunk(Counter(), steps=3)
    play(player, 2)
    player.reset()
    assert play(player, 1) == [20]


def test_overlapping_chunks_are_blended_with_exponential_weights():
    player = ActionChunk(Counter(), steps=1, blend=0.5)
    played = play(player, 5)
    for step, value in enumerate(played):
        # Answers of the last four steps speak of this one; the oldest weighs most.
        candidates = [10.0 * (asked + 1) + step - asked for asked in range(max(0, step - 3), step + 1)]
        weights = np.exp(-0.5 * np.arange(len(candidates)))
        assert value == pytest.approx(np.dot(candidates, weights) / weights.sum(), abs=1e-12)


def test_late_answers_skip_what_has_passed():
    player = ActionChunk(steps=2)
    player.answer(player.ask(), np.arange(4.0)[:, None])
    player.next(), player.next()
    assert player.due
    late = player.ask()
    assert not player.due  # one is awaited
    assert player.next() == 2  # the old chunk goes on meanwhile
    assert player.answer(late, 10 + np.arange(4.0)[:, None])
    assert player.next() == 11


def test_outdated_answers_are_not_played():
    player = ActionChunk(steps=1)
    first = player.ask()
    player.answer(first, np.zeros((2, 1)))
    player.next()
    slow, fast = player.ask(), player.ask()
    player.next()
    newer = player.ask()
    assert player.answer(newer, np.ones((3, 1)))
    assert not player.answer(slow, np.full((3, 1), 9.0))  # asked before the one that is played
    assert not player.answer(first, np.full((2, 1), 9.0))  # past its end
    player.reset()
    assert not player.answer(fast, np.full((3, 1), 9.0))  # of the last episode
    with pytest.raises(ValueError, match="no action for step 0: no chunk was answered yet"):
        player.next()


def test_past_its_end_is_an_error():
    player = ActionChunk()
    player.answer(player.ask(), np.zeros((2, 7)))
    player.next(), player.next()
    with pytest.raises(ValueError, match="no action for step 2: the last chunk was for steps 0 to 1"):
        player.next()


def test_a_policy_that_fails_is_asked_again():
    class Fails:
        def act(self, *_):
            raise ConnectionError("gone")

    player = ActionChunk(Fails())
    for _ in range(2):
        with pytest.raises(ConnectionError):
            player.act(None, "go")


class FailsOnce(Counter):
    """Fails when it is asked the second time."""

    def act(self, image, instruction, proprio=None):
        chunk = super().act(image, instruction, proprio)
        if self.calls == 2:
            raise ConnectionError("gone")
        return chunk


def test_after_a_failure_the_rest_of_the_old_chunk_is_not_played_unasked():
    player = ActionChunk(FailsOnce(8), steps=4)
    assert play(player, 4) == [10, 11, 12, 13]
    with pytest.raises(ConnectionError):
        player.act("image", "go")
    assert play(player, 5) == [30, 31, 32, 33, 40]


def test_a_thread_whose_policy_failed_asks_again_at_the_next_step():
    policy, plan = FailsOnce(8), []
    player = ActionChunk(policy, steps=4)
    with ThreadPoolExecutor(1) as thread:
        for _ in range(7):
            asked = player.ask_in(thread, "image", "go")
            if asked is not None:
                asked.exception()
            plan.append(player.next()[0])
    assert plan == [10, 11, 12, 13, 14, 30, 31]  # the failure was at the fifth step, whose action the old chunk has


def test_a_failure_of_the_episode_before_is_forgotten():
    player = ActionChunk(FailsOnce())
    player.policy.calls = 1
    with ThreadPoolExecutor(1) as thread:
        player.ask_in(thread, "image", "go").exception()
    player.reset()
    with pytest.raises(ValueError, match="no chunk was answered yet") as raised:
        player.next()
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros(7), r"must have shape \(chunk, action_dim\), got \(7,\)"),
        (np.full((4, 7), np.nan), "must be finite"),
        (np.zeros((2, 7)), "steps=3 actions are to be played, but the chunk holds 2"),
        (np.zeros((4, 6)), "The chunk has 6 dimensions, earlier ones 7"),
    ],
)
def test_bad_chunks(chunk, message):
    player = ActionChunk(steps=3)
    player.answer(player.ask(), np.zeros((4, 7)))
    with pytest.raises(ValueError, match=message):
        player.answer(player.ask(), chunk)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1.5}, {"blend": -1}, {"blend": np.nan}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="must be"):
        ActionChunk(Counter(), **bad)


def test_answers_from_another_thread():
    player = ActionChunk(steps=4)
    player.answer(player.ask(), np.zeros((8, 1)))
    stop, failures = threading.Event(), []

    def answering():
        while not stop.is_set():
            if player.due:
                ticket = player.ask()
                player.answer(ticket, ticket.step + np.arange(8.0)[:, None])

    thread = threading.Thread(target=answering)
    thread.start()
    try:
        for step in range(2000):
            try:
                action = player.next()[0]
            except ValueError as error:  # the thread was not scheduled in time: said, not papered over
                failures.append(str(error))
                player.reset()
                player.answer(player.ask(), np.zeros((8, 1)))
                continue
            assert action == 0 or 0 <= action < step + 8
    finally:
        stop.set()
        thread.join()
    assert all("There is no action" in failure for failure in failures)
