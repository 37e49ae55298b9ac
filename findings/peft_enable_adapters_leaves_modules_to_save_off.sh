#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2 (torch 2.13.0): enable_adapters() does not undo disable_adapters().
#
# The adapters of a model with LoRA on q_proj and a trained copy of lm_head (modules_to_save) are disabled and enabled.
#
# Expected: after disable_adapters() and enable_adapters() the model gives the logits that it gave before.
# Seen: disable_adapters() disables LoRA layers and modules_to_save; enable_adapters() enables LoRA layers alone.
#   The model continues with the old lm_head, without a warning. (5.24.0 has the same loop, but refuses this peft.)
#
# Output seen:
#   switched off after disable_adapters(): LoRA True, modules_to_save True
#   switched off after enable_adapters(): LoRA False, modules_to_save True
#   transformers 5.23.0, peft 0.21.2: largest difference of the logits after off and on: 0.264
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF'
import peft
import torch
import transformers

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()
model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
with torch.no_grad():  # as training would change it
    model.lm_head.modules_to_save["default"].weight.mul_(2)
ids = torch.arange(5)[None]
before = model(ids).logits
lora, copy = model.model.layers[0].self_attn.q_proj, model.lm_head
states = []
for switch in (model.disable_adapters, model.enable_adapters):
    switch()
    states.append((lora.disable_adapters, copy.disable_adapters))
    print(f"switched off after {switch.__name__}(): LoRA {states[-1][0]}, modules_to_save {states[-1][1]}")
difference = float((model(ids).logits - before).detach().abs().max())
print(f"transformers {transformers.__version__}, peft {peft.__version__}: ", end="")
print(f"largest difference of the logits after off and on: {difference:.3f}")
raise SystemExit(difference == 0 or states != [(True, True), (False, True)])
EOF
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" "$folder/try.py" || { echo "changed: what enable_adapters() switches on again" >&2; exit 1; }
