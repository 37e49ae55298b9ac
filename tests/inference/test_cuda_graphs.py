"""Recorded answers are the plain ones, or are not taken. What only a GPU can show is marked ``gpu``."""

import contextlib
import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from openvla import PLATFORMS, graphs_openvla, modeling_openvla
from openvla.graphs_openvla import KEPT, CudaRecording, Recordings
from openvla.tiny import build_tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from ways import adapt, alike, changes

BOUNDS = {"q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0}
SIZES = {part: PLATFORMS["libero"][f"{part}_dim"] for part in ("action", "proprio")}
STATISTICS = {part: {name: [value] * size for name, value in BOUNDS.items()} for part, size in SIZES.items()}
L1 = {
    **PLATFORMS["libero"],
    "parallel_decoding": True,
    "action_head": "l1",
    "num_images_in_input": 2,
    "norm_stats": {"made up": STATISTICS},
}
TOKENS = {**L1, "action_head": None, "proprio_dim": None, "num_images_in_input": 1}


class StandIn:
    """A recording without a GPU: it keeps copies of its inputs and computes anew from them."""

    made, replayed = 0, 0

    def __init__(self, compute, inputs, beside=None):
        assert beside is None or type(beside) is StandIn
        StandIn.made += 1
        self.compute, self.inputs = compute, [tensor.clone() for tensor in inputs]

    def replay(self, inputs):
        StandIn.replayed += 1
        for place, tensor in zip(self.inputs, inputs):
            place.copy_(tensor)
        return self.compute(*self.inputs)


@pytest.fixture
def recording(monkeypatch):
    """A tiny model that records, its processor, and what was warned of."""
    said = []
    monkeypatch.setattr(graphs_openvla.logger, "warning_once", said.append)
    monkeypatch.setattr(graphs_openvla, "_records", lambda model, inputs: True)
    monkeypatch.setattr(StandIn, "made", 0)
    monkeypatch.setattr(StandIn, "replayed", 0)
    model, processor = build_tiny()
    model._recordings = Recordings(model, StandIn)
    return model, processor, said


def asked(processor, frame, instruction="open the drawer"):
    return {**processor(instruction=instruction, images=frame), "return_dict": True, "constrain_actions": True}


same = functools.partial(alike, fast=None)


def test_the_second_answer_of_a_shape_is_recorded_and_the_third_replayed(recording, frames):
    model, processor, said = recording
    seen = [same(model, asked(processor, frames["noise"])) for _ in range(3)]
    assert (StandIn.made, StandIn.replayed) == (1, 2)  # one replay was the recording's check
    assert all(np.array_equal(seen[0], other) for other in seen)
    other = same(model, asked(processor, 255 - np.asarray(frames["noise"])))
    assert not np.array_equal(seen[0], other)
    assert (StandIn.made, StandIn.replayed) == (1, 3)
    same(model, asked(processor, frames["noise"], "open the drawers"))
    assert StandIn.made == 1  # another length, for the first time
    model.predict_action(**asked(processor, frames["noise"]), draft=np.zeros(7))
    assert (StandIn.made, StandIn.replayed) == (1, 3)
    assert not said


def test_the_least_recently_used_recording_goes(recording, frames):
    model, processor, _ = recording
    prompts = [asked(processor, frames["noise"], "go" + " on" * count) for count in range(KEPT + 1)]
    for prompt in prompts[:KEPT]:
        same(model, prompt)
        same(model, prompt)
    same(model, prompts[0])
    same(model, prompts[KEPT])
    assert StandIn.made == KEPT
    same(model, prompts[0])
    assert StandIn.replayed == KEPT + 2
    same(model, prompts[1])  # which had gone
    assert StandIn.replayed == KEPT + 2


def test_what_was_changed_since_counts(recording, frames):
    model, processor, said = recording
    inputs = asked(processor, frames["noise"])

    def a_hook():
        model.projector.fc1.register_forward_hook(lambda module, args, output: output * 2)

    seen = same(model, inputs)
    for change in (*changes(model), a_hook):
        same(model, inputs)
        same(model, inputs)
        made, replayed = StandIn.made, StandIn.replayed
        with torch.no_grad():
            change()
        now = same(model, inputs)
        assert not np.array_equal(now, seen), change
        assert (StandIn.made, StandIn.replayed) == (made, replayed), change
        seen = now
    assert StandIn.made == 5
    assert "was changed" in said[0]


def test_adapters_that_come_switch_and_go_count(recording, frames):
    pytest.importorskip("peft")
    model, processor, _ = recording
    inputs = asked(processor, frames["noise"])
    before = [same(model, inputs) for _ in range(3)][0]
    adapt(model)
    adapted = [same(model, inputs) for _ in range(3)]
    assert not np.array_equal(adapted[2], before)
    made, replayed = StandIn.made, StandIn.replayed
    model.disable_adapters()
    assert np.array_equal(same(model, inputs), before)
    assert (StandIn.made, StandIn.replayed) == (made, replayed)
    model.enable_adapters()
    assert np.array_equal(same(model, inputs), adapted[0])
    assert (StandIn.made, StandIn.replayed) == (made + 1, replayed + 1)  # anew
    model.merge_lora().eval()
    assert not np.array_equal(same(model, inputs), before)


def test_a_recording_that_fails_or_answers_otherwise_is_not_taken(recording, frames, monkeypatch):
    model, processor, said = recording
    inputs = asked(processor, frames["noise"])

    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    model._recordings.record = no_memory
    before = [same(model, inputs) for _ in range(4)][0]
    assert said == ["The same actions, but not as one CUDA graph: OutOfMemoryError: CUDA out of memory.. (Said once.)"]
    model._recordings = Recordings(model, StandIn)
    monkeypatch.setattr(StandIn, "replay", lambda self, inputs: (torch.zeros(1, 7), torch.zeros(1, 7, 611)))
    assert all(np.array_equal(same(model, inputs), before) for _ in range(4))
    assert "the recording answers otherwise" in said[1]


def test_a_recording_of_nothing_is_not_taken(recording, frames, monkeypatch):
    """As where the kernels go to another device's stream: they run while it is made, and no replay computes."""
    model, processor, said = recording
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    model._recordings = Recordings(model, CudaRecording)
    for frame in (frames["noise"], frames["noise"], 255 - np.asarray(frames["noise"])):
        inputs = asked(processor, frame)
        plain = model.predict_action(**inputs, fast=False)
        assert np.array_equal(model.predict_action(**inputs).token_ids, plain.token_ids)
    assert said == ["The same actions, but not as one CUDA graph: the recording answers otherwise. (Said once.)"]


def test_a_model_spread_over_devices_is_not_recorded(recording, frames):
    model, processor, said = recording
    model.projector.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    seen = [same(model, asked(processor, frames["noise"])) for _ in range(3)]
    assert all(np.array_equal(seen[0], other) for other in seen)
    assert StandIn.made == 0
    assert "spread over devices" in said[0]


def test_the_precision_of_products_counts_by_whichever_name_it_was_set(recording, frames):
    """On torch from 2.9 on the old names cannot be read any more once the new ones were set."""
    model, processor, _ = recording
    inputs = asked(processor, frames["noise"])
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    for _ in range(3):
        same(model, inputs)
    try:
        setattr(matmul, name, value)
        for _ in range(2):
            same(model, inputs)
    finally:
        setattr(matmul, name, before)
    assert (StandIn.made, StandIn.replayed) == (2, 3)


def test_threads_do_not_share_a_recordings_memory(recording, frames):
    model, processor, _ = recording
    inputs = [asked(processor, frame) for frame in (frames["noise"], 255 - np.asarray(frames["noise"]))]
    expected = [model.predict_action(**one, fast=False).bin_probabilities for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: model.predict_action(**one).token_ids, inputs * 12))
    plain = [model.predict_action(**one, fast=False).token_ids for one in inputs]
    assert all(np.array_equal(taken, plain[index % 2]) for index, taken in enumerate(together))
    assert not np.array_equal(*expected)
    with model._recordings.lock:  # as if another thread were at it
        replayed = StandIn.replayed
        same(model, inputs[0])
        assert StandIn.replayed == replayed


def test_copies_record_for_themselves(recording, frames):
    model, processor, _ = recording
    inputs = asked(processor, frames["noise"])
    before = [same(model, inputs) for _ in range(3)][0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._recordings is None
        replayed = StandIn.replayed
        assert np.array_equal(other.predict_action(**inputs).bin_probabilities, before)
        assert StandIn.replayed == replayed


@pytest.mark.lane
@pytest.mark.parametrize("fields", [{}, L1, TOKENS], ids=["tokens one by one", "l1 chunk", "token chunk"])
def test_an_answer_never_waits_for_the_device(fields, frames, monkeypatch):
    model, processor = build_tiny(**fields)
    calls = []
    monkeypatch.setattr(
        modeling_openvla,
        "recorded",
        lambda model, compute, inputs, key: calls.append((compute, inputs)) or compute(*inputs),
    )
    images = [frames["noise"]] * model.config.num_images_in_input
    inputs = processor(instruction="open the drawer", images=images)
    proprio = {} if model.config.proprio_dim is None else {"proprio": np.zeros(model.config.proprio_dim)}
    model.predict_action(**inputs, **proprio, constrain_actions=model.config.action_head is None)
    compute, tensors = calls[0]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        outputs = compute(*fake)
        assert len(outputs) == 2
        with pytest.raises(DataDependentOutputException):
            bool(outputs[0].isfinite().all())  # this is how waiting would have shown


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_gives_the_plain_answer(dtype, frames):
    model, processor = build_tiny()
    model.to("cuda", dtype)
    for name in ("noise", *frames):
        inputs = asked(processor, frames[name])
        plain = model.predict_action(**inputs, fast=False)
        taken = [model.predict_action(**inputs) for _ in range(3)]
        assert all(np.array_equal(plain.token_ids, one.token_ids) for one in taken)
        assert all(np.array_equal(taken[0].bin_probabilities, one.bin_probabilities) for one in taken)
    made = [one for one in model._recordings.made.values() if one]
    assert made
    assert all(type(one) is CudaRecording for one in made)
