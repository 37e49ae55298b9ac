"""Replayed predictions equal eager ones, or no graph is used. Tests that need a GPU are marked ``gpu``."""

import contextlib
import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from minivla import TINY_VQ, set_random_vq
from openvla import PLATFORMS
from openvla.inference import accelerator, cuda_graphs
from openvla.inference.cuda_graphs import MAX_GRAPHS, CapturedGraph, CudaGraphCache, Stages, finish
from openvla.tiny import build_tiny
from predictions import EagerGraph, add_adapter, compare_decoders, weight_changes
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

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
DIFFUSION = {**L1, "action_head": "diffusion", "num_diffusion_steps_train": 10, "num_diffusion_steps": 3}
FILM = {**L1, "use_film": True}
CHUNKS = {"l1 chunk": L1, "token chunk": TOKENS, "diffusion chunk": DIFFUSION, "chunk with FiLM": FILM}


@pytest.fixture
def graphed(monkeypatch):
    """A tiny model with a graph cache, its processor, and the warnings."""
    warnings = []
    monkeypatch.setattr(cuda_graphs.logger, "warning_once", warnings.append)
    monkeypatch.setattr(cuda_graphs, "_is_supported", lambda model, inputs: True)
    monkeypatch.setattr(EagerGraph, "captured", 0)
    monkeypatch.setattr(EagerGraph, "replayed", 0)
    model, processor = build_tiny()
    model._cuda_graphs = CudaGraphCache(model, EagerGraph)
    return model, processor, warnings


def inputs_of(processor, frame, instruction="open the drawer"):
    return {**processor(instruction=instruction, images=frame), "return_dict": True, "constrain_actions": True}


compare = functools.partial(compare_decoders, fast=None)


def test_second_call_of_a_shape_is_captured_and_third_replayed(graphed, frames):
    model, processor, warnings = graphed
    seen = [compare(model, inputs_of(processor, frames["noise"])) for _ in range(3)]
    assert (EagerGraph.captured, EagerGraph.replayed) == (1, 2)  # one replay verified the graph
    assert all(np.array_equal(seen[0], other) for other in seen)
    other = compare(model, inputs_of(processor, 255 - np.asarray(frames["noise"])))
    assert not np.array_equal(seen[0], other)
    assert (EagerGraph.captured, EagerGraph.replayed) == (1, 3)
    compare(model, inputs_of(processor, frames["noise"], "open the drawers"))
    assert EagerGraph.captured == 1  # another length, for the first time
    assert not warnings


def test_least_recently_used_graph_is_dropped(graphed, frames):
    model, processor, _ = graphed
    prompts = [inputs_of(processor, frames["noise"], "go" + " on" * count) for count in range(MAX_GRAPHS + 1)]
    for prompt in prompts[:MAX_GRAPHS]:
        compare(model, prompt)
        compare(model, prompt)
    compare(model, prompts[0])
    compare(model, prompts[MAX_GRAPHS])
    assert EagerGraph.captured == MAX_GRAPHS
    compare(model, prompts[0])
    assert EagerGraph.replayed == MAX_GRAPHS + 2
    compare(model, prompts[1])  # dropped before
    assert EagerGraph.replayed == MAX_GRAPHS + 2


def test_changed_model_drops_its_graphs(graphed, frames):
    model, processor, warnings = graphed
    inputs = inputs_of(processor, frames["noise"])

    def a_hook():
        model.projector.fc1.register_forward_hook(lambda module, args, output: output * 2)

    seen = compare(model, inputs)
    for change in (*weight_changes(model), a_hook):
        compare(model, inputs)
        compare(model, inputs)
        made, replayed = EagerGraph.captured, EagerGraph.replayed
        with torch.no_grad():
            change()
        now = compare(model, inputs)
        assert not np.array_equal(now, seen), change
        assert (EagerGraph.captured, EagerGraph.replayed) == (made, replayed), change
        seen = now
    assert EagerGraph.captured == 5
    assert "was changed" in warnings[0]


def test_adapter_changes_drop_the_graphs(graphed, frames):
    pytest.importorskip("peft")
    model, processor, _ = graphed
    inputs = inputs_of(processor, frames["noise"])
    before = [compare(model, inputs) for _ in range(3)][0]
    add_adapter(model)
    adapted = [compare(model, inputs) for _ in range(3)]
    assert not np.array_equal(adapted[2], before)
    made, replayed = EagerGraph.captured, EagerGraph.replayed
    model.disable_adapters()
    assert np.array_equal(compare(model, inputs), before)
    assert (EagerGraph.captured, EagerGraph.replayed) == (made, replayed)
    model.enable_adapters()
    assert np.array_equal(compare(model, inputs), adapted[0])
    assert (EagerGraph.captured, EagerGraph.replayed) == (made + 1, replayed + 1)  # anew
    model.merge_lora().eval()
    assert not np.array_equal(compare(model, inputs), before)


def test_graph_that_fails_or_differs_is_not_used(graphed, frames, monkeypatch):
    model, processor, warnings = graphed
    inputs = inputs_of(processor, frames["noise"])

    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    model._cuda_graphs.capture = no_memory
    before = [compare(model, inputs) for _ in range(4)][0]
    assert warnings == [f"Running without a CUDA graph: OutOfMemoryError: CUDA out of memory. {cuda_graphs.REMEDY}."]
    model._cuda_graphs = CudaGraphCache(model, EagerGraph)
    monkeypatch.setattr(EagerGraph, "replay", lambda self, *_, **__: (torch.zeros(1, 7), torch.zeros(1, 7, 611)))
    assert all(np.array_equal(compare(model, inputs), before) for _ in range(4))
    assert "its replay gives other numbers" in warnings[1]


def test_capture_that_fails_once_is_tried_again(graphed, frames):
    model, processor, warnings = graphed
    inputs, attempts = inputs_of(processor, frames["noise"]), []

    def capture(compute, tensors, shared=None):
        attempts.append(shared)
        if len(attempts) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return EagerGraph(compute, tensors, shared)

    model._cuda_graphs.capture = capture
    seen = [compare(model, inputs) for _ in range(4)]
    assert all(np.array_equal(seen[0], other) for other in seen)
    assert len(attempts) == 2
    assert EagerGraph.replayed == 3  # one to verify the graph, two calls
    assert not warnings


def test_drafts_are_captured(graphed, frames):
    """In stages: towers, prompt and draft, then each decode step that the draft does not save."""
    model, processor, warnings = graphed
    inputs = inputs_of(processor, frames["noise"])
    expected = model.predict_action(**inputs, fast=False)
    half_right = np.where(np.arange(7) < 3, expected.actions, -expected.actions)
    drafts = [expected.actions, half_right, -expected.actions, expected.actions]
    for draft in drafts:
        output = model.predict_action(**inputs, draft=draft)
        assert np.array_equal(output.token_ids, expected.token_ids)
        np.testing.assert_allclose(output.bin_probabilities, expected.bin_probabilities, rtol=0, atol=1e-5)
    assert (EagerGraph.captured, EagerGraph.replayed) == (1, 1 + len(drafts) - 2)
    other = inputs_of(processor, 255 - np.asarray(frames["noise"]))
    plain = model.predict_action(**other, fast=False)
    assert np.array_equal(model.predict_action(**other, draft=expected.actions).token_ids, plain.token_ids)
    assert not np.array_equal(plain.token_ids, expected.token_ids)
    assert EagerGraph.captured == 1
    assert not warnings


def test_graph_of_a_draft_is_verified_in_every_stage(graphed, frames, monkeypatch):
    """Also in the decode steps that the first draft saves."""
    model, processor, warnings = graphed
    inputs = inputs_of(processor, frames["noise"])
    expected = model.predict_action(**inputs, fast=False)
    replay = EagerGraph.replay

    def wrong_last_step(self, tensors, every_stage=False):
        tokens, logits = replay(self, tensors, every_stage)
        return (tokens, logits.index_fill(1, torch.tensor([6]), 0.0)) if every_stage else (tokens, logits)

    monkeypatch.setattr(EagerGraph, "replay", wrong_last_step)
    for _ in range(3):
        output = model.predict_action(**inputs, draft=expected.actions)
        assert np.array_equal(output.token_ids, expected.token_ids)
    assert "its replay gives other numbers" in warnings[0]


@pytest.fixture
def no_cuda(monkeypatch):
    """Replace the parts of torch.cuda that a capture needs; a replay then computes nothing."""
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: MagicMock())
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("num_skipped", [0, 2, 3])
def test_only_the_stages_that_are_needed_are_replayed(no_cuda, num_skipped):
    def compute(x):
        total = x.sum()
        stages = [functools.partial(total.add_, number) for number in (10, 100, 1000)]
        return Stages((total,), stages, torch.tensor(num_skipped))

    graph = CapturedGraph(compute, [torch.ones(3)])
    assert len(graph.later) == 3
    assert len({id(one) for one in (graph.graph, *graph.later)}) == 4
    graph.replay([torch.ones(3)])
    assert [one.replay.call_count for one in (graph.graph, *graph.later)] == [1] + [0] * num_skipped + [1] * (
        3 - num_skipped
    )
    graph.replay([torch.ones(3)], every_stage=True)
    assert all(one.replay.call_count > 0 for one in graph.later)


def test_replaced_scales_of_a_4_bit_weight_drop_the_graphs(graphed, frames):
    """Bitsandbytes keeps the scales beside the parameter, where a graph reads them."""
    model, processor, _ = graphed
    state = SimpleNamespace(absmax=torch.ones(3), state2=SimpleNamespace(absmax=torch.ones(2)))
    model.projector.fc1.weight.quant_state = state
    inputs = inputs_of(processor, frames["noise"])
    for part in (state, state.state2):
        for _ in range(3):
            compare(model, inputs)
        replayed = EagerGraph.replayed
        part.absmax = part.absmax.clone()
        compare(model, inputs)
        assert EagerGraph.replayed == replayed


def test_graph_without_kernels_is_not_used(graphed, frames, no_cuda):
    """Kernels on another device's stream run during the capture, and no replay computes."""
    model, processor, warnings = graphed
    model._cuda_graphs = CudaGraphCache(model, CapturedGraph)
    for frame in (frames["noise"], frames["noise"], 255 - np.asarray(frames["noise"])):
        inputs = inputs_of(processor, frame)
        plain = model.predict_action(**inputs, fast=False)
        assert np.array_equal(model.predict_action(**inputs).token_ids, plain.token_ids)
    assert warnings == [
        f"Running without a CUDA graph: its replay gives other numbers than the model. {cuda_graphs.REMEDY}."
    ]


def test_model_spread_over_devices_is_not_captured(graphed, frames):
    model, processor, warnings = graphed
    model.projector.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    seen = [compare(model, inputs_of(processor, frames["noise"])) for _ in range(3)]
    assert all(np.array_equal(seen[0], other) for other in seen)
    assert EagerGraph.captured == 0
    assert "spread over devices" in warnings[0]


def test_changed_matmul_precision_is_captured_anew(graphed, frames):
    """From torch 2.9 on the old names cannot be read after the new ones were set."""
    model, processor, _ = graphed
    inputs = inputs_of(processor, frames["noise"])
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    for _ in range(3):
        compare(model, inputs)
    try:
        setattr(matmul, name, value)
        for _ in range(2):
            compare(model, inputs)
    finally:
        setattr(matmul, name, before)
    assert (EagerGraph.captured, EagerGraph.replayed) == (2, 3)


def test_threads_do_not_share_the_memory_of_a_graph(graphed, frames):
    model, processor, _ = graphed
    inputs = [inputs_of(processor, frame) for frame in (frames["noise"], 255 - np.asarray(frames["noise"]))]
    expected = [model.predict_action(**one, fast=False).bin_probabilities for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: model.predict_action(**one).token_ids, inputs * 12))
    plain = [model.predict_action(**one, fast=False).token_ids for one in inputs]
    assert all(np.array_equal(taken, plain[index % 2]) for index, taken in enumerate(together))
    assert not np.array_equal(*expected)
    with model._cuda_graphs.lock:  # as if another thread used it
        replayed = EagerGraph.replayed
        compare(model, inputs[0])
        assert EagerGraph.replayed == replayed


def test_copies_have_their_own_cache(graphed, frames):
    model, processor, _ = graphed
    inputs = inputs_of(processor, frames["noise"])
    before = [compare(model, inputs) for _ in range(3)][0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._cuda_graphs is None
        replayed = EagerGraph.replayed
        assert np.array_equal(other.predict_action(**inputs).bin_probabilities, before)
        assert EagerGraph.replayed == replayed


@pytest.mark.lane
@pytest.mark.parametrize(
    ("fields", "draft"),
    [({}, None), ({}, np.zeros(7)), *((fields, None) for fields in CHUNKS.values())],
    ids=["tokens one by one", "draft", *CHUNKS],
)
def test_graphed_computation_never_synchronizes(fields, draft, frames, monkeypatch):
    model, processor = build_tiny(**fields)
    calls = []

    def run_graphed(model, compute, inputs, key):
        calls.append((compute, inputs))
        return finish(compute(*inputs))

    monkeypatch.setattr(accelerator, "run_graphed", run_graphed)
    patched = replace(accelerator.ACCELERATOR, run_graphed=run_graphed)
    monkeypatch.setattr(type(model), "accelerator", patched)
    images = [frames["noise"]] * model.config.num_images_in_input
    inputs = processor(instruction="open the drawer", images=images)
    proprio = {} if model.config.proprio_dim is None else {"proprio": np.zeros(model.config.proprio_dim)}
    model.predict_action(**inputs, **proprio, draft=draft, constrain_actions=model.config.action_head is None)
    compute, tensors = calls[0]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        outputs = compute(*fake)
        assert isinstance(outputs, Stages) == (draft is not None)
        if draft is not None:
            outputs = outputs.run_later(0)
        assert len(outputs) == 2
        with pytest.raises(DataDependentOutputException):
            bool(outputs[0].isfinite().all())  # a synchronization raises this


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_equals_eager(dtype, frames):
    model, processor = build_tiny()
    model.to("cuda", dtype)
    for name in ("noise", *frames):
        inputs = inputs_of(processor, frames[name])
        plain = model.predict_action(**inputs, fast=False)
        taken = [model.predict_action(**inputs) for _ in range(3)]
        assert all(np.array_equal(plain.token_ids, one.token_ids) for one in taken)
        assert all(np.array_equal(taken[0].bin_probabilities, one.bin_probabilities) for one in taken)
    graphs = [graph for graph in model._cuda_graphs.graphs.values() if graph]
    assert graphs
    assert all(type(graph) is CapturedGraph for graph in graphs)


MINIVLA = {**TINY_VQ, "image_sequence_len": 4, "use_wrist_image": True}


def test_codes_of_several_images_are_captured(graphed, frames):
    """MiniVLA: five tokens are a chunk of four actions; codes are decoded outside the graph."""
    model, processor = build_tiny(**MINIVLA)
    set_random_vq(model)
    model._cuda_graphs = CudaGraphCache(model, EagerGraph)
    images = [frames["noise"], frames["black"], frames["white"], frames["noise"]]
    seen = [compare(model, inputs_of(processor, images)) for _ in range(3)]
    assert seen[0].shape == (5, 64)
    assert (EagerGraph.captured, EagerGraph.replayed) == (1, 2)
    assert all(np.array_equal(seen[0], other) for other in seen)
    assert not np.array_equal(seen[0], compare(model, inputs_of(processor, images[::-1])))
    assert not np.array_equal(seen[0], compare(model, inputs_of(processor, [frames["white"]] + images[1:])))
