"""On a GPU the same frame gives the same action, in every way to predict: python -m pytest -m gpu."""

import numpy as np
import pytest
import torch
from openvla.benchmarking.sizes import CHUNK_FIELDS, INSTRUCTIONS, overrides
from openvla.inference import cuda_graphs
from openvla.inference.cuda_graphs import CapturedGraph
from openvla.inference.fast_decoder import compile_pointwise
from openvla.inference.kernels import SWITCH
from openvla.inference.merged_products import merge_products
from openvla.tiny import build_tiny
from predictions import add_adapter

pytestmark = pytest.mark.gpu
QUESTIONS, REPEATS, BATCH_SIZE = 40, 4, 8
# Continuous actions in [-1, 1] of 32 bfloat16 layers (8 bits of mantissa): products of other shapes round otherwise.
BF16_TOLERANCE = 0.1
HEADS = {
    "l1": {"action_head": "l1"},
    "l1 with FiLM": {"action_head": "l1", "use_film": True},
    "diffusion": {"action_head": "diffusion", "num_diffusion_steps_train": 20, "num_diffusion_steps": 5},
}


def build(**fields):
    """Return a bfloat16 model of OpenVLA-7B's depth at an eighth of its width, on the GPU, and its processor."""
    torch.manual_seed(0)
    model, processor = build_tiny(**overrides("eighth"), **fields)
    model.to("cuda", torch.bfloat16)
    merge_products(model.language_model)  # as load_policy does
    return model, processor


def questions(processor, count=QUESTIONS, cameras=1):
    random = np.random.default_rng(0)
    for index in range(count):
        frames = list(random.integers(0, 256, (cameras, 256, 256, 3), dtype=np.uint8))
        instruction = INSTRUCTIONS[index % len(INSTRUCTIONS)]
        yield processor(instruction=instruction, images=frames if cameras > 1 else frames[0], device="cuda")


def require_one_answer(predict, inputs):
    """Ask every question four times and check that each has one answer, bit for bit; return the answers."""
    answers = []
    for question in inputs:
        repeats = [np.asarray(predict(question)) for _ in range(REPEATS)]
        assert all(np.array_equal(repeats[0], other) for other in repeats)
        answers.append(repeats[0])
    return answers


def require_captured(model):
    """Check that a model was captured, and that no capture failed."""
    graphs = [graph for graph in model._cuda_graphs.graphs.values() if graph is not None]
    assert graphs
    assert all(isinstance(graph, CapturedGraph) for graph in graphs)


@pytest.fixture(scope="module")
def single():
    return build()


@pytest.mark.parametrize("way", ["plain", "fast", "captured", "draft", "without Triton", "compiled", "adapter"])
def test_single_actions_are_reproducible(single, way, monkeypatch):
    model, processor = single if way not in ("compiled", "adapter") else build()
    cuda_graphs.drop_graphs(model)
    if way == "fast":
        monkeypatch.setattr(cuda_graphs, "_is_supported", lambda model, inputs: False)
    elif way == "without Triton":
        monkeypatch.setenv(SWITCH, "0")
    elif way == "compiled":
        compile_pointwise(model)
    elif way == "adapter":
        pytest.importorskip("peft")
        add_adapter(model)
    arguments = {"plain": {"fast": False}, "draft": {"draft": np.zeros(7)}}.get(way, {})

    def predict(inputs):
        return model.predict_action(**inputs, constrain_actions=True, **arguments)

    inputs = list(questions(processor))
    answers = require_one_answer(predict, inputs)
    assert len({answer.tobytes() for answer in answers}) > 1
    if way not in ("plain", "fast"):
        require_captured(model)
    if way == "draft":  # a whole right draft, which one pass verifies; its products may round otherwise than steps
        pairs = zip(inputs, answers)
        require_one_answer(lambda pair: model.predict_action(**pair[0], constrain_actions=True, draft=pair[1]), pairs)


def test_batches_are_reproducible(single):
    model, processor = single
    random = np.random.default_rng(1)
    batches = [
        processor(
            instruction=[INSTRUCTIONS[0]] * BATCH_SIZE,
            images=list(random.integers(0, 256, (BATCH_SIZE, 256, 256, 3), dtype=np.uint8)),
            device="cuda",
        )
        for _ in range(QUESTIONS // BATCH_SIZE)
    ]
    require_one_answer(lambda inputs: model.predict_action(**inputs, constrain_actions=True), batches)
    require_captured(model)


def test_4_bit_actions_are_captured_and_reproducible(single, tmp_path):
    pytest.importorskip("bitsandbytes")
    from openvla import OpenVLAForActionPrediction, quantization_config

    model, processor = single
    model.save_pretrained(tmp_path)
    quantized = OpenVLAForActionPrediction.from_pretrained(
        tmp_path, quantization_config=quantization_config(4), device_map={"": "cuda"}
    ).eval()
    require_one_answer(
        lambda inputs: quantized.predict_action(**inputs, constrain_actions=True), list(questions(processor))
    )
    require_captured(quantized)


@pytest.mark.parametrize("head", HEADS)
def test_chunks_are_captured_and_reproducible(head):
    model, processor = build(**{**CHUNK_FIELDS, **HEADS[head]})
    noise = {}
    if head == "diffusion":
        noise["noise"] = torch.randn(model.chunk_shape, generator=torch.Generator().manual_seed(0))
    inputs = list(questions(processor, cameras=2))

    def predict(one):
        return model.predict_action(**one, proprio=np.zeros(model.config.proprio_dim), **noise)

    answers = require_one_answer(predict, inputs)
    require_captured(model)
    cuda_graphs.drop_graphs(model)
    plain = [model.predict_action(**one, proprio=np.zeros(8), fast=False, **noise) for one in inputs[:4]]
    for captured, expected in zip(answers, plain):
        np.testing.assert_allclose(captured, expected, atol=BF16_TOLERANCE)
