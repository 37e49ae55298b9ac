"""A TraceVLA as a policy: frames in, traces drawn by a tracker; captured, quantised and with an adapter."""

import hashlib

import numpy as np
import pytest
import torch
from openvla import Policy, VisualTrace, load_policy
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.evaluation.checks import refuse_tracevla
from openvla.inference import cuda_graphs
from openvla.inference.cuda_graphs import CudaGraphCache
from openvla.inference.visual_trace import evaluation_frame
from openvla.tiny import build_tiny
from PIL import Image
from predictions import EagerGraph, add_adapter, compare_decoders
from tracevla import SOURCE, moving_points, read

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
STATISTICS = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}
TRACEVLA = {
    "trace_prompting": True,
    "norm_stats": {"bridge_orig": STATISTICS, "fractal20220817_data": STATISTICS},
}
FRAMES = np.random.RandomState(0).randint(0, 256, (12, 120, 160, 3), dtype=np.uint8)
UNTRAINED = {"constrain_actions": True, "device": "cpu"}


@pytest.fixture(scope="module")
def tracevla():
    """Return a tiny TraceVLA and its processor."""
    return build_tiny(**TRACEVLA)


@pytest.fixture(scope="module")
def folder(tracevla, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracevla")
    for part in tracevla:
        part.save_pretrained(folder)
    return folder


def predict(policy, images, instruction="open the drawer"):
    """Return the action for images as the processor takes them."""
    inputs = policy.processor(instruction=instruction, images=images)
    return policy.model.predict_action(**inputs, unnorm_key=policy.unnorm_key, constrain_actions=True)


@pytest.mark.parametrize("index", range(4))
def test_frames_are_prepared_as_in_evaluation(index):
    arrays, case = np.load(SOURCE / "resize.npz"), read("resize.json")["cases"][index]
    prepared = np.array(evaluation_frame(arrays[f"frame{index}"]))
    assert hashlib.sha256(prepared.tobytes()).hexdigest() == case["tracevla_256_sha256"]


def test_a_policy_with_a_tracker_draws_the_trace(folder):
    policy = load_policy(folder, unnorm_key="fractal20220817_data", tracker=moving_points, **UNTRAINED)
    expected = VisualTrace(moving_points, window_size=15)
    for _ in range(2):
        for step, array in enumerate(FRAMES, start=1):
            frame = evaluation_frame(array)
            traced = expected.update(frame)
            assert (traced is not None) == (step >= 10)
            action = policy.act(array, "open the drawer")
            assert np.array_equal(action, predict(policy, frame if traced is None else [frame, traced]))
        policy.reset()
        expected.reset()
        assert policy.visual_trace.step == 0
    with pytest.raises(ValueError, match="draws the trace itself; give the frame of its camera alone"):
        policy.act([FRAMES[0], FRAMES[1]], "open the drawer")


def test_the_window_is_that_of_the_robot_or_one_s_own(folder):
    assert (
        load_policy(folder, unnorm_key="bridge_orig", tracker=moving_points, **UNTRAINED).visual_trace.window_size == 10
    )
    key = "fractal20220817_data"
    assert load_policy(folder, unnorm_key=key, tracker=moving_points, **UNTRAINED).visual_trace.window_size == 15
    own = VisualTrace(moving_points, window_size=3)
    assert load_policy(folder, unnorm_key=key, tracker=own, **UNTRAINED).visual_trace is own


def test_a_policy_without_a_tracker_sees_the_frame_twice(folder):
    policy = load_policy(folder, unnorm_key="bridge_orig", **UNTRAINED)
    frame = evaluation_frame(FRAMES[0])
    for image in (FRAMES[0], Image.fromarray(FRAMES[0]), [FRAMES[0]]):
        assert np.array_equal(policy.act(image, "open the drawer"), predict(policy, frame))
    pair = [frame, evaluation_frame(FRAMES[1])]  # of a client that draws the traces
    assert np.array_equal(policy.act(pair, "open the drawer"), predict(policy, pair))


def test_both_prompts_are_warmed_up(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(Policy, "_predict", lambda self, images, *_: seen.append(images[0] is images[1]))
    policy = load_policy(folder, unnorm_key="bridge_orig", tracker=moving_points, warmup=["go"], **UNTRAINED)
    assert sorted(seen) == [False] * 3 + [True] * 3
    assert policy.visual_trace.step == 0


def test_a_tracker_is_refused_where_it_has_no_effect(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no TraceVLA .*; leave tracker out"):
        load_policy(tmp_path, tracker=moving_points, **UNTRAINED)
    with pytest.raises(ValueError, match="no TraceVLA .*leave visual_trace out"):
        Policy(tiny.model, tiny.processor, "untrained", True, VisualTrace(moving_points))


def test_evaluations_with_two_cameras_refuse_a_tracevla(tracevla):
    with pytest.raises(ValueError, match="takes the frame of one camera and the traces on it"):
        refuse_tracevla(Policy(*tracevla, "bridge_orig", True))


def test_captured_predictions_equal_plain_ones(monkeypatch):
    model, processor = build_tiny(**TRACEVLA)
    warnings = []
    monkeypatch.setattr(cuda_graphs.logger, "warning_once", warnings.append)
    monkeypatch.setattr(cuda_graphs, "_is_supported", lambda model, inputs: True)
    monkeypatch.setattr(EagerGraph, "captured", 0)
    monkeypatch.setattr(EagerGraph, "replayed", 0)
    model._cuda_graphs = CudaGraphCache(model, EagerGraph)
    pair = [Image.fromarray(FRAMES[0]), Image.fromarray(FRAMES[1])]
    for count, images in enumerate((pair, pair[0]), start=1):
        inputs = {**processor(instruction="open the drawer", images=images), "unnorm_key": "bridge_orig"}
        seen = [compare_decoders(model, inputs, fast=None) for _ in range(3)]
        assert (EagerGraph.captured, EagerGraph.replayed) == (count, 2 * count)
        assert all(np.array_equal(seen[0], other) for other in seen)
    model.vision_backbone.sep_tok.weight.data = model.vision_backbone.sep_tok.weight.data * 100
    assert not np.array_equal(compare_decoders(model, inputs, fast=None), seen[0])
    assert "was changed" in warnings[0]


def test_an_adapter_changes_the_action_and_is_merged(folder, tmp_path):
    pytest.importorskip("peft")
    policy = load_policy(folder, unnorm_key="bridge_orig", **UNTRAINED)
    pair = [evaluation_frame(FRAMES[0]), evaluation_frame(FRAMES[1])]
    plain = predict(policy, pair)
    add_adapter(policy.model)
    adapted = predict(policy, pair)
    assert not np.array_equal(adapted, plain)
    policy.model.save_lora(tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter", unnorm_key="bridge_orig", tracker=moving_points, **UNTRAINED)
    assert again.model.config.trace_prompting
    assert np.array_equal(predict(again, pair), adapted)
    again.model.merge_lora()
    assert again.model.vision_backbone.sep_tok.weight.shape == (1, again.model.vision_backbone.embed_dim)
    assert predict(again, pair).shape == (7,)


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
@pytest.mark.parametrize(("bits", "backend"), [(8, "bitsandbytes"), (4, "bitsandbytes"), (8, "torchao")])
def test_a_quantised_model_keeps_its_separator(folder, bits, backend, tracevla, tmp_path):
    pytest.importorskip(backend)
    policy = load_policy(folder, bits=bits, backend=backend, unnorm_key="bridge_orig", **UNTRAINED)
    separator = policy.model.vision_backbone.sep_tok.weight
    assert torch.equal(separator.float(), tracevla[0].vision_backbone.sep_tok.weight)
    pair = [evaluation_frame(FRAMES[0]), evaluation_frame(FRAMES[1])]
    action = predict(policy, pair)
    for part in (policy.model, policy.processor):
        part.save_pretrained(tmp_path)
    again = load_policy(tmp_path, unnorm_key="bridge_orig", tracker=moving_points, **UNTRAINED)
    assert np.array_equal(predict(again, pair), action)
