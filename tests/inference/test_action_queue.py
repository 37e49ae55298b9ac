"""ActionQueue: open-loop execution, temporal ensembling, late chunks, failures, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openvla import ActionQueue


class CountingPolicy:
    """Policy whose chunks contain 10 * (number of the call) + (index of the action)."""

    def __init__(self, length=4):
        self.length, self.calls, self.last_inputs = length, 0, None

    def act(self, image, instruction, proprio=None):
        self.calls, self.last_inputs = self.calls + 1, (image, instruction, proprio)
        return 10.0 * self.calls + np.arange(self.length)[:, None] + np.zeros((1, 2))


class FailsOnSecondCall(CountingPolicy):
    def act(self, image, instruction, proprio=None):
        chunk = super().act(image, instruction, proprio)
        if self.calls == 2:
            raise ConnectionError("gone")
        return chunk


def execute(queue, count):
    return [queue.act("image", "go", [0.5])[0] for _ in range(count)]


def test_open_loop_requests_after_n_action_steps():
    policy = CountingPolicy()
    queue = ActionQueue(policy, n_action_steps=3)
    assert execute(queue, 7) == [10, 11, 12, 20, 21, 22, 30]
    assert policy.last_inputs == ("image", "go", [0.5])
    assert execute(ActionQueue(CountingPolicy()), 5) == [10, 11, 12, 13, 20]


def test_reset_requests_a_new_chunk():
    queue = ActionQueue(CountingPolicy(), n_action_steps=3)
    execute(queue, 2)
    queue.reset()
    assert execute(queue, 1) == [20]


def test_temporal_ensemble_averages_with_exponential_weights():
    queue = ActionQueue(CountingPolicy(), n_action_steps=1, temporal_ensemble_coeff=0.5)
    executed = execute(queue, 5)
    for step, value in enumerate(executed):
        # The chunks of the last four steps have an action for this one; the oldest weighs most.
        candidates = [10.0 * (start + 1) + step - start for start in range(max(0, step - 3), step + 1)]
        weights = np.exp(-0.5 * np.arange(len(candidates)))
        assert value == pytest.approx(np.dot(candidates, weights) / weights.sum(), abs=1e-12)


def test_late_chunk_skips_past_actions():
    queue = ActionQueue(n_action_steps=2)
    queue.push(queue.request(), np.arange(4.0)[:, None])
    queue.next(), queue.next()
    assert queue.needs_chunk
    late = queue.request()
    assert not queue.needs_chunk  # one is pending
    assert queue.next() == 2  # the old chunk continues meanwhile
    assert queue.push(late, 10 + np.arange(4.0)[:, None])
    assert queue.next() == 11


def test_outdated_chunks_are_dropped():
    queue = ActionQueue(n_action_steps=1)
    first = queue.request()
    queue.push(first, np.zeros((2, 1)))
    queue.next()
    slow, fast = queue.request(), queue.request()
    queue.next()
    newer = queue.request()
    assert queue.push(newer, np.ones((3, 1)))
    assert not queue.push(slow, np.full((3, 1), 9.0))  # requested before the newest chunk
    assert not queue.push(first, np.full((2, 1), 9.0))  # all its steps are past
    queue.reset()
    assert not queue.push(fast, np.full((3, 1), 9.0))  # of the last episode
    with pytest.raises(ValueError, match="no action for step 0: no chunk was pushed yet"):
        queue.next()


def test_next_raises_after_the_last_action():
    queue = ActionQueue()
    queue.push(queue.request(), np.zeros((2, 7)))
    queue.next(), queue.next()
    with pytest.raises(ValueError, match="no action for step 2: the last chunk was for steps 0 to 1"):
        queue.next()


def test_act_calls_the_policy_again_after_a_failure():
    class AlwaysFails:
        def act(self, *_):
            raise ConnectionError("gone")

    queue = ActionQueue(AlwaysFails())
    for _ in range(2):
        with pytest.raises(ConnectionError):
            queue.act(None, "go")


def test_act_does_not_execute_the_old_chunk_after_a_failure():
    queue = ActionQueue(FailsOnSecondCall(8), n_action_steps=4)
    assert execute(queue, 4) == [10, 11, 12, 13]
    with pytest.raises(ConnectionError):
        queue.act("image", "go")
    assert execute(queue, 5) == [30, 31, 32, 33, 40]


def test_request_async_requests_again_after_a_failure():
    policy, executed = FailsOnSecondCall(8), []
    queue = ActionQueue(policy, n_action_steps=4)
    with ThreadPoolExecutor(1) as executor:
        for _ in range(7):
            future = queue.request_async(executor, "image", "go")
            if future is not None:
                future.exception()
            executed.append(queue.next()[0])
    assert executed == [10, 11, 12, 13, 14, 30, 31]  # the failure was at the fifth step, taken from the old chunk


def test_reset_forgets_the_failure_of_the_previous_episode():
    queue = ActionQueue(FailsOnSecondCall())
    queue.policy.calls = 1
    with ThreadPoolExecutor(1) as executor:
        queue.request_async(executor, "image", "go").exception()
    queue.reset()
    with pytest.raises(ValueError, match="no chunk was pushed yet") as raised:
        queue.next()
    assert raised.value.__cause__ is None


def test_queue_without_policy_cannot_act():
    with pytest.raises(ValueError, match="has no policy; pass one, or request and push chunks yourself"):
        ActionQueue().act("image", "go")


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros(7), r"must have shape \(chunk, action_dim\), got \(7,\)"),
        (np.full((4, 7), np.nan), "must be finite"),
        (np.zeros((2, 7)), "n_action_steps=3 actions are to be executed, but the chunk has 2"),
        (np.zeros((4, 6)), "The chunk has 6 dimensions, earlier ones have 7"),
    ],
)
def test_push_rejects_invalid_chunks(chunk, message):
    queue = ActionQueue(n_action_steps=3)
    queue.push(queue.request(), np.zeros((4, 7)))
    with pytest.raises(ValueError, match=message):
        queue.push(queue.request(), chunk)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_action_steps": 0},
        {"n_action_steps": 1.5},
        {"temporal_ensemble_coeff": -1},
        {"temporal_ensemble_coeff": np.nan},
    ],
)
def test_invalid_arguments_are_rejected(arguments):
    with pytest.raises(ValueError, match="must be"):
        ActionQueue(CountingPolicy(), **arguments)


def test_chunks_can_be_pushed_from_another_thread():
    queue = ActionQueue(n_action_steps=4)
    queue.push(queue.request(), np.zeros((8, 1)))
    stop, failures = threading.Event(), []

    def push_chunks():
        while not stop.is_set():
            if queue.needs_chunk:
                request_id = queue.request()
                queue.push(request_id, request_id.step + np.arange(8.0)[:, None])

    thread = threading.Thread(target=push_chunks)
    thread.start()
    try:
        for step in range(2000):
            try:
                action = queue.next()[0]
            except ValueError as error:  # the thread was not scheduled in time
                failures.append(str(error))
                queue.reset()
                queue.push(queue.request(), np.zeros((8, 1)))
                continue
            assert action == 0 or 0 <= action < step + 8
    finally:
        stop.set()
        thread.join()
    assert all("There is no action" in failure for failure in failures)
