"""Choice of the 8- or 4-bit format and of the dtype in which a model is loaded."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import HEAD_MODULES
from ..quantization_openvla import require_bitsandbytes

# Modules that are never quantised: they turn features into embeddings, hidden states into logits and actions.
# transformers matches such names as prefixes, as suffixes and, in some versions, as regular expressions ("proj" would
# also match every q_proj), and names replace its default, lm_head: hence full names.
UNQUANTIZED_MODULES = ("projector", "language_model.lm_head", *HEAD_MODULES)
VISION_TOWERS = "vision_backbone"
QUANT_TYPES = ("nf4", "fp4")


def quantization_config(
    bits: int,
    *,
    double_quant: bool | None = None,
    quant_type: str | None = None,
    compute_dtype: torch.dtype | None = None,
    towers: bool = False,
) -> BitsAndBytesConfig:
    """Return a ``quantization_config`` for ``from_pretrained``: 8- or 4-bit weights of the language model.

    Args:
        bits: 8 (LLM.int8) or 4.
        double_quant: 4 bits only: quantise the scales too (None: yes), which takes 0.13 instead of 0.5 further bits a
            weight.
        quant_type: 4 bits only: "nf4" (the default) or "fp4".
        compute_dtype: 4 bits only: the dtype of the products; None is bfloat16 where the hardware has it, else float16
            on a GPU and float32 on a CPU. (8 bits always compute in float16.)
        towers: Quantise the vision towers too.

    Raises:
        ValueError: Another number of bits or type, or a 4-bit argument with 8 bits.
        ImportError: bitsandbytes is not installed, or this transformers cannot use it on this machine.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise OpenVLAValueError(f"bits must be 8 or 4, got {bits!r}; leave the quantization out for full precision.")
    if quant_type not in (None, *QUANT_TYPES):
        raise OpenVLAValueError(f"quant_type must be one of {list(QUANT_TYPES)}, got {quant_type!r}.")
    only_4_bits = {"double_quant": double_quant, "quant_type": quant_type, "compute_dtype": compute_dtype}
    unused = [name for name, value in only_4_bits.items() if value is not None]
    if bits == 8 and unused:
        raise OpenVLAValueError(f"{', '.join(unused)}: of 4 bits only, leave it out; 8-bit weights compute in float16.")
    require_bitsandbytes()
    skip_modules = [*UNQUANTIZED_MODULES] if towers else [VISION_TOWERS, *UNQUANTIZED_MODULES]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type or QUANT_TYPES[0],
        bnb_4bit_use_double_quant=double_quant is not False,
        bnb_4bit_compute_dtype=compute_dtype or fast_dtype(),
        llm_int8_skip_modules=skip_modules,
    )


def fast_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """Return bfloat16 where the hardware has it; else float16 on a GPU and float32 on a CPU."""
    if torch.device(device or "cuda").type == "cuda" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(check and check())
