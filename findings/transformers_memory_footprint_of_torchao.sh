#!/usr/bin/env bash
# transformers 5.24.0 with torchao 0.18.0 (the newest on 2026-11-28): get_memory_footprint() does not see torchao's quantisation.
#
# A Llama of random weights is saved in bfloat16 and loaded twice, as it is and with TorchAoConfig(Int8DynamicActivation...).
#
# Expected: as with bitsandbytes, model.get_memory_footprint() is smaller for the quantised model, here by almost half; its docstring
#   says "the memory footprint of a model", "useful to benchmark the memory footprint of the current model".
# Seen: the same number for both. A weight of torchao reports the element size of the dtype that it computes in, not of the int8
#   tensor inside; torch.cuda.memory_allocated() or the tensors of __tensor_flatten__ give what is held.
#
# Output seen:
#   in bfloat16: 3.43 MB by get_memory_footprint(), 3.43 MB held
#   in int8: 3.43 MB by get_memory_footprint(), 1.87 MB held
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF2'
import sys

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig


def held(model):
    tensors = []
    for p in (*model.parameters(), *model.buffers()):
        inner = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else None
        tensors += [p] if inner is None else [getattr(p, name) for name in inner]
    return sum(t.nelement() * t.element_size() for t in tensors)


config = LlamaConfig(
    vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
)
folder = sys.argv[1]
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
quantization = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
sizes = {}
for name, kwargs in (("bfloat16", {}), ("int8", {"quantization_config": quantization})):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
    sizes[name] = model.get_memory_footprint(), held(model)
    print(f"in {name}: {sizes[name][0] / 1e6:.2f} MB by get_memory_footprint(), {sizes[name][1] / 1e6:.2f} MB held")
sys.exit(not (sizes["int8"][0] == sizes["bfloat16"][0] and sizes["int8"][1] < 0.7 * sizes["bfloat16"][1]))
EOF2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 transformers==5.24.0 accelerate numpy
"$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2>/dev/null || { echo "changed" >&2; exit 1; }
