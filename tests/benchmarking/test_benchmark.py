"""``openvla bench``: its figures belong to answers that are compared. (The published code as a peer is run by hand.)"""

import json

import pytest
import torch
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.__main__ import main
from openvla.benchmarking import benchmark
from openvla.benchmarking import sizes as benchmark_sizes
from openvla.conversion.hub_weights import weight_files
from openvla.conversion.safetensors_io import tensor_digests
from openvla.inference import fast_decoder
from openvla.inference.cpu_prepack import has_matmul
from openvla.tiny import TINY_TOWERS, build_config, language_config
from predictions import needs_compiler


def test_all_sides_answer_alike(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    asked = ["--sizes", "tiny", "--dtypes", "float32", "bfloat16", "--pairs", "1", "--inputs", "3", "--threads", "1"]
    asked += ["--rows", *benchmark.ROWS, "preprocessing"]
    assert main(["bench", *asked, "--json", str(file), "--plot", str(picture)]) == 0
    report = json.loads(file.read_text())
    actions = [row for row in report["rows"] if row["row"] == benchmark.ACTION]
    assert [row["side"] for row in actions][:3] == ["openvla, fast=False", "transformers, static cache", "openvla"]
    in_both = has_matmul(torch.bfloat16)  # else nothing is prepacked in bfloat16
    assert [row["dtype"] for row in actions] == ["float32"] * 6 + ["bfloat16"] * (5 + in_both)
    assert all(row["equal"] == row["of"] == 21 for row in actions if row["dtype"] == "float32")
    in_bfloat16 = actions[6:]
    assert all(0 < row["equal to float32"] <= 21 for row in in_bfloat16)
    if in_both:
        assert in_bfloat16[-1]["side"] == "openvla, prepack"
        # The same bits as without.
        assert in_bfloat16[-1]["equal to float32"] == in_bfloat16[2]["equal to float32"]
    assert all(row["seconds"] > 0 and row["share of the floor"] > 0 for row in actions)
    others = [row for row in report["rows"] if row not in actions]
    parts = [benchmark.PIXELS, benchmark.FIRST_TOKEN, benchmark.TOWERS, benchmark.BATCH, benchmark.STEP]
    frames = [row for row in others if row["row"] not in parts]
    assert len(frames) == 6
    assert all(row["equal"] == row["of"] == 3 for row in frames)
    by_row = {part: [row for row in others if row["row"] == part] for part in parts}
    assert all(len(rows) == 4 for rows in by_row.values())  # two sides in two dtypes
    assert all(row["share of the floor"] for rows in by_row.values() for row in rows)
    for part, values in zip(parts[:-1], (7, 1, 1, 8 * 7)):
        assert all(row["of"] == 3 * values for row in by_row[part])
        assert all(row["equal"] == row["of"] for row in by_row[part] if row["dtype"] == "float32")
    three = (by_row[part] for part in (benchmark.STEP, benchmark.PIXELS, benchmark.FIRST_TOKEN))
    for step, whole, first in zip(*three):
        assert step["seconds"] == pytest.approx((whole["seconds"] - first["seconds"]) / 6)
    said = capsys.readouterr().out
    assert "| tiny | float32 | an action" in said
    assert "Not run beside the published code: --reference" in said
    assert ("Not run on a GPU" in said) == (not torch.cuda.is_available())
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_compiler
def test_a_fused_side_is_compiled_answers_alike_and_leaves_the_others_alone(tmp_path, monkeypatch):
    file, compiled, plain = tmp_path / "figures.json", [], torch.compile
    monkeypatch.setattr(fast_decoder._compiled_gated_silu, "compiled", None)  # as before the first answer of a process
    monkeypatch.setattr(torch, "compile", lambda *given, **options: compiled.append(1) or plain(*given, **options))
    asked = ["--sizes", "tiny", "--dtypes", "float32", "--pairs", "1", "--inputs", "3", "--threads", "1"]
    assert main(["bench", *asked, "--rows", "action", "--json", str(file)]) == 0
    assert not compiled
    assert main(["bench", *asked, "--rows", "action", "--compile", "--json", str(file)]) == 0
    assert compiled
    rows = {row["side"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows[benchmark.COMPILED]["equal"] == rows[benchmark.COMPILED]["of"] == 21


def test_a_peer_needs_both_its_code_and_its_python(tmp_path, capsys):
    assert main(["bench", "--reference", str(tmp_path)]) == 2
    assert "--reference-python" in capsys.readouterr().err
    asked = ["--sizes", "tiny", "--inputs", "1", "--reference", str(tmp_path), "--reference-python", "/bin/false"]
    with pytest.raises(RuntimeError, match="status 1"):
        main(["bench", *asked])


def test_full_size_weights_are_written_one_by_one_and_answer_with_actions(tmp_path, monkeypatch, frames):
    """The way they are written, of a model with Llama-2's vocabulary that is small otherwise."""

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
    answers = []
    for frame in (frames["noise"], frames["white"]):
        inputs = processor(instruction=benchmark_sizes.INSTRUCTIONS[0], images=frame)
        assert inputs["input_ids"].shape[1] < 30
        answers.append(model.predict_action(**inputs, return_dict=True).token_ids.tolist())
    actions = model.action_token_ids
    assert all(actions.start <= token < actions.stop for tokens in answers for token in tokens)
    assert answers[0] != answers[1]
