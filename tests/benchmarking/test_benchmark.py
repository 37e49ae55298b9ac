"""``openvla bench``: measurements and comparisons of the backends. (The published code is compared by hand.)"""

import json

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor, quantization_config
from openvla.__main__ import main
from openvla.benchmarking import backends, benchmark, roofline
from openvla.benchmarking import sizes as benchmark_sizes
from openvla.benchmarking.reference import checksums
from openvla.benchmarking.roofline import gemm_rate, read_rate
from openvla.conversion.hub_weights import weight_files
from openvla.conversion.safetensors_io import tensor_digests
from openvla.inference import kernels
from openvla.inference.cpu_prepack import has_matmul
from openvla.inference.fast_decoder import FastDecoder
from openvla.tiny import TINY_TOWERS, build_config, language_config
from predictions import needs_compiler

TINY = ["--sizes", "tiny", "--threads", "1", "--inputs", "3"]


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Give peak rates instead of measuring them, which takes two seconds."""
    monkeypatch.setattr(roofline, "gemm_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(roofline, "read_rate", lambda device: 1e10)


def bench(tmp_path, *options):
    """Run ``openvla bench`` at tiny size with more options; return its JSON report."""
    file = tmp_path / "report.json"
    assert main(["bench", *TINY, *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_all_stages_and_backends_are_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "report.png"
    stages = [stage for stage in benchmark.STAGES if stage != "quantized"]
    options = ["--dtypes", "float32", "bfloat16", "--repeats-per-question", "1", "--plot", str(picture)]
    measurements = bench(tmp_path, *options, "--stages", *stages)["measurements"]
    prepacks = {"float32": has_matmul(torch.float32), "bfloat16": has_matmul(torch.bfloat16)}
    by_stage = {}
    for entry in measurements:
        # A decode step is a difference of two medians, which may be negative on a busy machine.
        assert entry["seconds"] > 0 or "the machine is busy" in entry["error"], entry
        by_stage.setdefault(entry["stage"], []).append(entry)
    actions, pixels = by_stage[benchmark.ACTION], by_stage[benchmark.PIXELS]
    whole = ["openvla, fast=False", "openvla", "transformers, static cache"]
    drafts = ["openvla, fast=False", "openvla", "openvla, correct draft", "openvla, wrong draft"]
    for dtype in prepacks:
        names = [entry["backend"] for entry in actions if entry["dtype"] == dtype]
        assert names == whole + ["openvla, prepack"] * prepacks[dtype]
        assert [entry["backend"] for entry in pixels if entry["dtype"] == dtype] == drafts
    in_bfloat16 = {entry["backend"]: entry for entry in actions if entry["dtype"] == "bfloat16"}
    assert all(0 < entry["equal_to_float32"] <= 21 for entry in in_bfloat16.values())
    if prepacks["bfloat16"]:  # bitwise equal to the backend without prepacking
        assert in_bfloat16["openvla, prepack"]["equal_to_float32"] == in_bfloat16["openvla"]["equal_to_float32"]
    batches = {stage: size for size, stage in benchmark.BATCHES.items()}
    values = {benchmark.ACTION: 7, benchmark.PIXELS: 7, benchmark.FIRST_TOKEN: 1, benchmark.TOWERS: 1}
    for stage, count in {**values, **{stage: 7 * size for stage, size in batches.items()}}.items():
        for entry in by_stage[stage]:
            assert entry["calls"] == 3
            assert entry["roofline_fraction"] > 0
            assert entry["compared"] == 3 * count
            assert entry["dtype"] == "bfloat16" or entry["equal"] == entry["compared"]
            assert ("actions_per_second" in entry) == (count > 1)
    for stage, size in batches.items():
        assert all(entry["actions_per_second"] == pytest.approx(size / entry["seconds"]) for entry in by_stage[stage])
    for entry in by_stage[benchmark.CHUNK]:
        assert entry["compared"] == 3 * 8 * 7
        assert entry["actions_per_second"] == pytest.approx(8 / entry["seconds"])
        assert entry["largest_difference"] <= (1e-5 if entry["dtype"] == "float32" else 0.1)
    steps = by_stage[benchmark.DECODE_STEP]
    first_tokens = by_stage[benchmark.FIRST_TOKEN]
    assert len(steps) == len(first_tokens) == 4  # two backends in two dtypes
    whole_actions = [entry for entry in pixels if entry["backend"] in whole]
    for step, action, first_token in zip(steps, whole_actions, first_tokens):
        seconds = (action["seconds"] - first_token["seconds"]) / 6
        assert step["seconds"] == pytest.approx(seconds)
        assert ("error" in step) == (seconds <= 0)
    for name in ("warm-up", *(f"{name} after warm-up" for name in ("first answer", "second answer", "later answers"))):
        assert len(by_stage[name]) == 2
    preprocessing = [stage for stage in by_stage if stage.startswith("preprocessing")]
    assert len(preprocessing) == 3
    out = capsys.readouterr().out
    assert out.count("\n| tiny | ") == len(measurements)
    assert "Not run beside the published code: --reference" in out
    assert ("Not run on a GPU" in out) == (not torch.cuda.is_available())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peak_rates_are_measured():
    assert gemm_rate("cpu", torch.float32) > 1e8
    assert read_rate("cpu") > 1e8


def test_correct_drafts_take_one_pass_and_wrong_ones_seven(monkeypatch):
    runner = backends.ModelRunner.build("tiny-deep", dtype="bfloat16", device="cpu", num_inputs=4)
    runner.predict_drafts()
    passes, run = [], FastDecoder.run
    monkeypatch.setattr(FastDecoder, "run", lambda *args: passes.append(1) or run(*args))
    for index in range(4):
        runner.action_from_correct_draft(index)
        assert len(passes) == 1
        runner.action_from_wrong_draft(index)
        assert len(passes) == 1 + 7
        passes.clear()


def test_quantized_weights_are_measured_or_the_row_says_why_not(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    measurements = bench(tmp_path, "--dtypes", "float32", "--stages", "quantized")["measurements"]
    by_backend = {entry["backend"]: entry for entry in measurements}
    for name in ("nf4", "8 bits"):
        for backend in (f"openvla, {name}", f"openvla, {name}, fast=False"):
            assert by_backend[backend]["seconds"] > 0
            assert by_backend[backend]["baseline"] == "openvla"
            assert 0 < by_backend[backend]["equal"] <= by_backend[backend]["compared"]
    failed = [entry for entry in measurements if "error" in entry]
    assert {entry["stage"] for entry in failed} <= {f"{benchmark.PIXELS}, 8 bits, torchao"}
    assert capsys.readouterr().out.count("not measured: ") == len(failed)


def test_quantized_weights_are_those_of_a_loaded_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    runner = backends.ModelRunner.build("tiny", dtype="bfloat16", device="cpu", num_inputs=2)
    runner.model.save_pretrained(tmp_path)
    config = quantization_config(**backends.QUANTIZED["nf4"])
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path, quantization_config=config).eval()
    functions = backends.quantized_backends(runner, "nf4")
    for index in range(2):
        assert functions["openvla, nf4"](index) == runner.with_model(loaded).action_from_pixels(index)


def test_questions_with_several_answers_are_counted(tmp_path, monkeypatch):
    plain = backends.ModelRunner.towers
    calls = []

    def changing(self, index, *, fast):
        calls.append(index)
        return np.array([len(calls)]) if index == 1 and fast else plain(self, index, fast=fast)

    monkeypatch.setattr(backends.ModelRunner, "towers", changing)
    options = ["--dtypes", "float32", "--stages", "towers", "--repeats-per-question", "3"]
    measurements = bench(tmp_path, *options)["measurements"]
    assert [(entry["backend"], entry["several_answers"], entry["asked_again"]) for entry in measurements] == [
        ("openvla, fast=False", 0, 3),
        ("openvla", 1, 3),
    ]
    assert (measurements[1]["calls"], measurements[1]["equal"], measurements[1]["compared"]) == (9, 6, 9)


def test_a_stage_ends_when_its_time_is_over(tmp_path):
    options = ["--dtypes", "float32", "--stages", "towers", "--seconds-per-stage", "0"]
    assert {entry["calls"] for entry in bench(tmp_path, *options)["measurements"]} == {5}


def test_a_failing_backend_becomes_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fail(self, index, **options):
        raise RuntimeError("CUDA out of memory. | Tried\nmore")

    monkeypatch.setattr(backends.ModelRunner, "action_from_correct_draft", fail)
    measurements = bench(tmp_path, "--dtypes", "float32", "--stages", "pixels", "towers")["measurements"]
    failed = [entry for entry in measurements if "error" in entry]
    assert [(entry["stage"], entry["backend"]) for entry in failed] == [(benchmark.PIXELS, backends.DRAFT_CORRECT)]
    assert len(measurements) == 6
    assert "not measured: RuntimeError: CUDA out of memory. / Tried |" in capsys.readouterr().out


def test_the_report_is_written_after_every_stage(tmp_path, monkeypatch):
    def interrupted(self, index, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(backends.ModelRunner, "towers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, "--dtypes", "float32", "--stages", "pixels", "towers")
    assert len(json.loads((tmp_path / "report.json").read_text())["measurements"]) == 4


def test_profile_lists_operators_by_time(tmp_path, capsys):
    options = ["--dtypes", "float32", "--stages", "towers", "--profile"]
    profiles = {entry["backend"]: entry["kernels"] for entry in bench(tmp_path, *options)["profiles"]}
    assert {"openvla", "openvla, fast=False"} <= set(profiles)
    for profile in profiles.values():
        milliseconds = [kernel["ms"] for kernel in profile]
        assert milliseconds == sorted(milliseconds, reverse=True)
        assert 0 < sum(kernel["share"] for kernel in profile) <= 1 + 1e-9
        assert all(kernel["calls"] > 0 for kernel in profile)
    assert "openvla, fast=False: kernels by time" in capsys.readouterr().out


@needs_compiler
def test_compiled_backend_predicts_the_same_and_leaves_the_others_uncompiled(tmp_path, monkeypatch):
    compiled, plain = [], torch.compile
    monkeypatch.setattr(kernels.COMPILED.gated_silu, "compiled", None)  # as in a new process
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(1) or plain(*args, **kwargs))
    options = ["--dtypes", "float32", "--repeats-per-question", "1", "--stages", "action"]
    bench(tmp_path, *options)
    assert not compiled
    measurements = {entry["backend"]: entry for entry in bench(tmp_path, *options, "--compile")["measurements"]}
    assert compiled
    assert measurements[backends.COMPILED]["equal"] == measurements[backends.COMPILED]["compared"] == 21


def test_reference_needs_its_code_and_its_python(tmp_path, capsys):
    assert main(["bench", "--reference", str(tmp_path)]) == 2
    assert "--reference-python" in capsys.readouterr().err
    options = ["--reference", str(tmp_path), "--reference-python", "/bin/false"]
    measurements = bench(tmp_path, "--dtypes", "float32", "--stages", "towers", *options)["measurements"]
    assert measurements[0]["backend"] == "published code"
    assert "status 1" in measurements[0]["error"]
    assert len(measurements) == 3


def test_weights_depend_on_names_alone_and_not_on_the_dtype():
    model, _ = benchmark_sizes.build_model("tiny", "cpu", torch.float32)
    again, _ = benchmark_sizes.build_model("tiny", "cpu", torch.bfloat16)
    chunk, _ = benchmark_sizes.build_model("tiny", "cpu", torch.bfloat16, **benchmark_sizes.CHUNK_FIELDS)
    expected = {name: parameter.to(torch.bfloat16) for name, parameter in model.named_parameters()}
    for other in (again, chunk):
        parameters = dict(other.named_parameters())
        assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
        assert all(torch.equal(parameters[name], weight) for name, weight in expected.items())
    assert checksums(again) == {name: checksums(chunk)[name] for name in expected}


def test_checksums_differ_after_one_bit_changes():
    model, _ = benchmark_sizes.build_model("tiny", "cpu", torch.bfloat16)
    before = checksums(model)
    name, parameter = next(iter(model.named_parameters()))
    parameter.data.view(torch.int16).view(-1)[0] ^= 1
    assert [other for other, checksum in checksums(model).items() if checksum != before[other]] == [name]


def test_other_weights_in_the_worker_are_refused(tmp_path):
    """The worker is a Python that announces other checksums."""
    worker = tmp_path / "python"
    ready = json.dumps({"versions": {"torch": "1.0"}, "checksums": {}})
    worker.write_text(f"#!/bin/sh\necho 'READY {ready}'\ncat >/dev/null\n")
    worker.chmod(0o755)
    options = ["--reference", str(tmp_path), "--reference-python", str(worker)]
    first = bench(tmp_path, "--dtypes", "float32", "--stages", "towers", *options)["measurements"][0]
    assert "tensors differ between both processes" in first["error"]
    assert "torch 1.0" in first["error"]


def test_write_model_writes_a_model_that_predicts_actions(tmp_path, monkeypatch, frames):
    """With Llama-2's vocabulary and a small model otherwise."""

    def narrow(tokenizer, **fields):
        text = {**language_config(tokenizer), **fields["text_config"]}
        return build_config(
            tokenizer, **{**fields, "timm_model_kwargs": list(TINY_TOWERS.values()), "text_config": text}
        )

    monkeypatch.setattr(benchmark_sizes, "build_config", narrow)
    written = benchmark_sizes.write_model("full", tmp_path / "model")
    assert written == tensor_digests(weight_files(tmp_path / "model"))
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "model").eval()
    processor = OpenVLAProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.shape[0] == 32064
    predictions = []
    for frame in (frames["noise"], frames["white"]):
        inputs = processor(instruction=benchmark_sizes.INSTRUCTIONS[0], images=frame)
        assert inputs["input_ids"].shape[1] < 30
        predictions.append(model.predict_action(**inputs, return_dict=True).token_ids.tolist())
    actions = model.action_token_ids
    assert all(actions.start <= token < actions.stop for tokens in predictions for token in tokens)
    assert predictions[0] != predictions[1]
