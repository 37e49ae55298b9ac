"""Folders that one transformers version writes must load in every other: run by ci/lanes.sh in each lane.

python exchange.py write DIR     save a model and its processor, with the action that it predicts
python exchange.py read DIR...   load each folder by trust_remote_code in this version, and predict the same
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import transformers

INSTRUCTION = "Pick up the red block"
ODD_TEXT = "héllo, wörld: 42\nOut:"


def predict(model, processor):
    """Return inputs and outputs that must not depend on the version."""
    frame = np.random.RandomState(0).randint(0, 256, (240, 320, 3), dtype=np.uint8)
    inputs = processor(instruction=INSTRUCTION, images=frame)
    options = {} if model.config.action_head else {"constrain_actions": True}
    output = model.predict_action(**inputs, **options, return_dict=True)
    return {
        "input_ids": inputs["input_ids"].tolist(),
        "odd_ids": processor.tokenizer(ODD_TEXT)["input_ids"],
        "pixel_sum": float(inputs["pixel_values"].double().sum()),
        "token_ids": None if output.token_ids is None else output.token_ids.tolist(),
        "actions": output.actions.tolist(),
    }


def write(folder):
    """Save a Llama with an untied head (also as OFT and as TraceVLA), and a Qwen with a tied head and another base."""
    from openvla import PLATFORMS
    from openvla.tiny import PADDED_ROWS, build_tiny, build_tokenizer

    vocabulary = build_tokenizer().pad_token_id
    qwen = {"model_type": "qwen2", "vocab_size": vocabulary + PADDED_ROWS, "rope_theta": 1e6, "hidden_size": 64}
    qwen |= {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    oft = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "proprio_dim": None}
    models = {
        "llama": {},
        "oft": oft,
        "tracevla": {"trace_prompting": True},
        "qwen2": {"text_config": qwen, "empty_token_id": None},
    }
    for name, overrides in models.items():
        model, processor = build_tiny(**overrides)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        (folder / name / "expected.json").write_text(json.dumps(predict(model, processor)))


def read(folder):
    """Load a folder with its own code and compare what it predicts."""
    expected = json.loads((folder / "expected.json").read_text())
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    auto_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    actual = predict(model, processor)
    if actual != expected:
        wrong = [name for name in expected if actual[name] != expected[name]]
        raise SystemExit(
            f"transformers {transformers.__version__}: {folder} differs in {wrong}: {actual} != {expected}"
        )


if __name__ == "__main__":
    for category in (FutureWarning, DeprecationWarning):  # raised by the folder's code or this package
        warnings.simplefilter("error", category)
    # How transformers 4.40 itself imports a folder's code.
    warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
    command, folders = sys.argv[1], [Path(argument).resolve() for argument in sys.argv[2:]]
    if command == "write":
        write(folders[0])
    else:
        sys.modules["openvla"] = None  # as if the package were not installed
        os.chdir(tempfile.mkdtemp())
        for folder in folders:
            read(folder)
        print(f"transformers {transformers.__version__} reads {len(folders)} folders of other versions")
