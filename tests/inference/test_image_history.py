"""A policy sees the images of the last moments in the order of training, and of one episode only."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from minivla import read_json
from openvla import ActionQueue, OpenVLAConfig, Policy
from openvla.inference.image_history import ImageHistory
from openvla.tiny import build_tiny

EPISODES = read_json("libero_eval.json")["episodes"]


def config_of(moments, wrist=False):
    return OpenVLAConfig(image_sequence_len=moments * (1 + wrist), use_wrist_image=wrist)


@pytest.mark.parametrize("name", EPISODES)
def test_padding_at_the_end_gives_openvla_mini_s_evaluation(name):
    episode = EPISODES[name]
    settings = episode["config"]
    history = ImageHistory(config_of(settings["obs_history"], settings["use_wrist_image"]), padding="end")
    for step, call in enumerate(episode["calls"]):
        cameras = ["agentview_image", "robot0_eye_in_hand_image"][: 1 + settings["use_wrist_image"]]
        moment = [f"{camera} {step}" for camera in cameras]
        images = history.append(moment if len(moment) > 1 else moment[0])
        expected = [f"{image['camera']} {image['frame']}" for image in call["images"]]
        assert (images if call["given_as_list"] else [images]) == expected


def test_padding_at_the_start_gives_training_s_windows():
    history = ImageHistory(config_of(3))
    assert [history.append(f"f{step}") for step in range(4)] == [
        ["f0", "f0", "f0"],
        ["f0", "f0", "f1"],
        ["f0", "f1", "f2"],
        ["f1", "f2", "f3"],
    ]
    history.clear()
    assert history.append("f9") == ["f9", "f9", "f9"]


def test_all_images_pass_unchanged_and_are_not_kept():
    history = ImageHistory(config_of(2, wrist=True))
    every = ["a", "wa", "b", "wb"]
    assert history.append(every) is every
    assert history.append(["c", "wc"]) == ["c", "wc", "c", "wc"]


def test_another_number_of_images_is_an_error():
    with pytest.raises(ValueError, match=r"2 image\(s\) a moment, of 2 moments: .* all 4, .* got 3"):
        ImageHistory(config_of(2, wrist=True)).append(["a", "b", "c"])
    with pytest.raises(ValueError, match="Unknown history_padding 'middle'"):
        ImageHistory(config_of(2), padding="middle")


def test_a_camera_that_overwrites_its_array_does_not_change_the_history():
    history, frame = ImageHistory(config_of(2)), np.zeros((4, 4, 3), np.uint8)
    history.append(frame)
    frame[:] = 255
    assert [image.max() for image in history.append(frame)] == [0, 255]


@pytest.fixture(scope="module")
def policy():
    model, processor = build_tiny(image_sequence_len=2)
    return Policy(model, processor, model.resolve_unnorm_key(), constrain_actions=True)


def test_a_policy_keeps_the_history_until_reset(policy, frames, monkeypatch):
    seen = []
    processor = policy.processor
    monkeypatch.setattr(policy, "processor", lambda **kwargs: seen.append(kwargs["images"]) or processor(**kwargs))
    first, second = np.asarray(frames["noise"]), np.asarray(frames["black"])
    actions = [policy.act(frame, "open the drawer") for frame in (first, second)]
    policy.reset()
    again = policy.act(second, "open the drawer")
    whole = [policy.act(images, "open the drawer") for images in ([first, first], [first, second], [second, second])]
    assert np.array_equal(actions, whole[:2])
    assert np.array_equal(again, whole[2])
    assert all(len(images) == 2 for images in seen)


class Recorder:
    """A policy that predicts chunks of two steps, and the images of every request."""

    def __init__(self):
        self.requests = []

    def new_history(self):
        return ImageHistory(config_of(2))

    def act(self, image, instruction, proprio=None):
        self.requests.append(image)
        return np.zeros((2, 7))


def test_a_queue_feeds_the_history_at_steps_without_a_request():
    recorder = Recorder()
    queue = ActionQueue(recorder)
    for step in range(4):
        queue.act(f"f{step}", "go")
    queue.reset()
    queue.act("f9", "go")
    assert recorder.requests == [["f0", "f0"], ["f1", "f2"], ["f9", "f9"]]


def test_an_asynchronous_queue_takes_the_images_of_the_step_of_the_request():
    recorder = Recorder()
    queue = ActionQueue(recorder)
    with ThreadPoolExecutor(1) as executor:
        for step in range(4):
            future = queue.request_async(executor, f"f{step}", "go")
            if future is not None:
                future.result()
            queue.next()
    assert recorder.requests == [["f0", "f0"], ["f1", "f2"]]


def test_two_queues_of_one_policy_have_their_own_histories():
    recorder = Recorder()
    queues = [ActionQueue(recorder), ActionQueue(recorder)]
    for name, queue in zip("ab", queues):
        queue.act(name, "go")
    assert recorder.requests == [["a", "a"], ["b", "b"]]
