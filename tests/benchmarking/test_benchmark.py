"""``openvla bench``: measurements and comparisons of the backends. (The published code is compared by hand.)"""

import json

import pytest
import torch
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.__main__ import main
from openvla.benchmarking import backends, benchmark
from openvla.benchmarking import sizes as benchmark_sizes
from openvla.conversion.hub_weights import weight_files
from openvla.conversion.safetensors_io import tensor_digests
from openvla.inference import kernels
from openvla.inference.cpu_prepack import has_matmul
from openvla.tiny import TINY_TOWERS, build_config, language_config
from predictions import needs_compiler


def test_all_backends_predict_the_same_tokens(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ["--sizes", "tiny", "--dtypes", "float32", "bfloat16", "--repeats", "1", "--inputs", "3"]
    options += ["--threads", "1", "--stages", *benchmark.STAGES, "preprocessing"]
    assert main(["bench", *options, "--json", str(file), "--plot", str(picture)]) == 0
    report = json.loads(file.read_text())
    measurements = report["measurements"]
    actions = [entry for entry in measurements if entry["stage"] == benchmark.ACTION]
    assert [entry["backend"] for entry in actions][:3] == [
        "openvla, fast=False",
        "transformers, static cache",
        "openvla",
    ]
    prepacks_bfloat16 = has_matmul(torch.bfloat16)
    assert [entry["dtype"] for entry in actions] == ["float32"] * 6 + ["bfloat16"] * (5 + prepacks_bfloat16)
    assert all(entry["equal"] == entry["compared"] == 21 for entry in actions if entry["dtype"] == "float32")
    in_bfloat16 = actions[6:]
    assert all(0 < entry["equal_to_float32"] <= 21 for entry in in_bfloat16)
    if prepacks_bfloat16:
        assert in_bfloat16[-1]["backend"] == "openvla, prepack"
        # Bitwise equal to the backend without prepacking.
        assert in_bfloat16[-1]["equal_to_float32"] == in_bfloat16[2]["equal_to_float32"]
    assert all(entry["seconds"] > 0 and entry["roofline_fraction"] > 0 for entry in actions)
    others = [entry for entry in measurements if entry not in actions]
    stages = [benchmark.PIXELS, benchmark.FIRST_TOKEN, benchmark.TOWERS, benchmark.BATCH, benchmark.DECODE_STEP]
    preprocessing = [entry for entry in others if entry["stage"] not in stages]
    assert len(preprocessing) == 6
    assert all(entry["equal"] == entry["compared"] == 3 for entry in preprocessing)
    by_stage = {stage: [entry for entry in others if entry["stage"] == stage] for stage in stages}
    assert all(len(entries) == 4 for entries in by_stage.values())  # two backends in two dtypes
    assert all(entry["roofline_fraction"] for entries in by_stage.values() for entry in entries)
    for stage, values in zip(stages[:-1], (7, 1, 1, 8 * 7)):
        assert all(entry["compared"] == 3 * values for entry in by_stage[stage])
        assert all(entry["equal"] == entry["compared"] for entry in by_stage[stage] if entry["dtype"] == "float32")
    three = (by_stage[stage] for stage in (benchmark.DECODE_STEP, benchmark.PIXELS, benchmark.FIRST_TOKEN))
    for step, action, first_token in zip(*three):
        assert step["seconds"] == pytest.approx((action["seconds"] - first_token["seconds"]) / 6)
    out = capsys.readouterr().out
    assert "| tiny | float32 | action from image" in out
    assert "Not run beside the published code: --reference" in out
    assert ("Not run on a GPU" in out) == (not torch.cuda.is_available())
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_compiler
def test_compiled_backend_predicts_the_same_and_leaves_the_others_uncompiled(tmp_path, monkeypatch):
    file, compiled, plain = tmp_path / "report.json", [], torch.compile
    monkeypatch.setattr(kernels.COMPILED.gated_silu, "compiled", None)  # as in a new process
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(1) or plain(*args, **kwargs))
    options = ["--sizes", "tiny", "--dtypes", "float32", "--repeats", "1", "--inputs", "3", "--threads", "1"]
    assert main(["bench", *options, "--stages", "action", "--json", str(file)]) == 0
    assert not compiled
    assert main(["bench", *options, "--stages", "action", "--compile", "--json", str(file)]) == 0
    assert compiled
    measurements = {entry["backend"]: entry for entry in json.loads(file.read_text())["measurements"]}
    assert measurements[backends.COMPILED]["equal"] == measurements[backends.COMPILED]["compared"] == 21


def test_reference_needs_its_code_and_its_python(tmp_path, capsys):
    assert main(["bench", "--reference", str(tmp_path)]) == 2
    assert "--reference-python" in capsys.readouterr().err
    options = ["--sizes", "tiny", "--inputs", "1", "--reference", str(tmp_path), "--reference-python", "/bin/false"]
    with pytest.raises(RuntimeError, match="status 1"):
        main(["bench", *options])


def test_write_full_writes_a_model_that_predicts_actions(tmp_path, monkeypatch, frames):
    """With Llama-2's vocabulary and a small model otherwise."""

    def narrow(tokenizer, **fields):
        text = {**language_config(tokenizer), **fields["text_config"]}
        return build_config(
            tokenizer, **{**fields, "timm_model_kwargs": list(TINY_TOWERS.values()), "text_config": text}
        )

    monkeypatch.setattr(benchmark_sizes, "build_config", narrow)
    written = benchmark_sizes.write_full(tmp_path / "model", torch.bfloat16)
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
