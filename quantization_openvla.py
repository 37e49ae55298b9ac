"""8- and 4-bit weights through bitsandbytes: what is quantised, and how nothing about it is silently wrong."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from .compatibility_openvla import DTYPE_FIELD, QUANTIZES_ON_CPU
from .configuration_openvla import hub_keywords
from .errors_openvla import OpenVLAImportError, OpenVLAValueError
from .heads_openvla import HEAD_MODULES

# Never quantised: what turns features into embeddings, hidden states into logits and actions. transformers matches such
# names as prefixes, as suffixes and, in some versions, as regular expressions ("proj" would also keep every q_proj as
# it is), and giving any drops its own default, lm_head: hence whole names.
UNQUANTIZED_MODULES = ("projector", "language_model.lm_head", *HEAD_MODULES)
VISION_TOWERS = "vision_backbone"
QUANT_TYPES = ("nf4", "fp4")

# Measured: docs/quantising.md.
SLOW_ON_CPU = (
    "8-bit weights are slow on a CPU: an action took 1.6 to 3.3 times as long as with whole weights, in 4 bits 1.3 to "
    "2.1 times. Take bits=4 for less memory, or whole weights for speed (dtype=torch.bfloat16 for half of float32's "
    "memory). (Said once.)"
)
CPU_PACKING_ROWS = 32  # rows of a weight that bitsandbytes packs together for AVX512-BF16


def quantization_config(
    bits: int,
    *,
    double_quant: bool | None = None,
    quant_type: str | None = None,
    compute_dtype: torch.dtype | None = None,
    towers: bool = False,
) -> BitsAndBytesConfig:
    """What to give ``from_pretrained(..., quantization_config=...)`` for 8- or 4-bit weights of the language model.

    Args:
        bits: 8 (LLM.int8) or 4.
        double_quant: 4 bits: quantise the scales too (None: yes); 0.13 instead of 0.5 further bits a weight.
        quant_type: 4 bits: "nf4" (None too) or "fp4".
        compute_dtype: 4 bits: what weights are unpacked to and multiplied in; None is bfloat16 where the hardware has
            it, else float16 on a GPU and float32 on a CPU. (8 bits compute in float16, always.)
        towers: Quantise the vision towers too.

    Raises:
        ValueError: Another number of bits or kind, or an argument of 4 bits for 8.
        ImportError: bitsandbytes is not installed, or this transformers cannot use it on this machine.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise OpenVLAValueError(f"bits must be 8 or 4, got {bits!r}; leave the quantization out for full precision.")
    if quant_type not in (None, *QUANT_TYPES):
        raise OpenVLAValueError(f"quant_type must be one of {list(QUANT_TYPES)}, got {quant_type!r}.")
    of_4_bits = {"double_quant": double_quant, "quant_type": quant_type, "compute_dtype": compute_dtype}
    unused = [name for name, value in of_4_bits.items() if value is not None]
    if bits == 8 and unused:
        raise OpenVLAValueError(f"{', '.join(unused)}: of 4 bits only, leave it out; 8-bit weights compute in float16.")
    require_bitsandbytes()
    kept = [*UNQUANTIZED_MODULES] if towers else [VISION_TOWERS, *UNQUANTIZED_MODULES]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type or QUANT_TYPES[0],
        bnb_4bit_use_double_quant=double_quant is not False,
        bnb_4bit_compute_dtype=compute_dtype or fast_dtype(),
        llm_int8_skip_modules=kept,
    )


def fast_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """bfloat16 where the hardware has it; else float16 on a GPU and float32 on a CPU."""
    if torch.device(device or "cuda").type == "cuda" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(check and check())


def require_bitsandbytes() -> None:
    """Raise ImportError where bitsandbytes is missing, or this transformers would fail with it half-way."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OpenVLAImportError("8- and 4-bit weights need bitsandbytes: pip install 'openvla[quant]'")
    accelerators = [torch.cuda, getattr(torch, "xpu", None)]
    if not QUANTIZES_ON_CPU and not any(kind is not None and kind.is_available() for kind in accelerators):
        raise OpenVLAImportError(
            f"transformers {transformers.__version__} cannot use bitsandbytes without a GPU; install transformers 4.53 "
            "or later, or load in full precision. No weight was read."
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds (part of) the model's weights."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def quantization_name(model: nn.Module) -> str | None:
    """What the weights are held in, int8, nf4 or fp4; None for a plain model."""
    if not is_quantized(model):
        return None
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return model.config.quantization_config.bnb_4bit_quant_type


def stored_quantization(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Any:
    """The quantization that a checkpoint was saved with, or None; ``kwargs`` are ``from_pretrained``'s."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return getattr(config, "quantization_config", None)
    return PretrainedConfig.get_config_dict(name_or_path, **hub_keywords(kwargs))[0].get("quantization_config")


def prepare_quantization(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]) -> None:
    """Before any weight is read: raise for a quantization that cannot be carried out, else settle its dtype.

    What is not quantised keeps the checkpoint's dtype where none is given; transformers 4.x would make it float16.

    Raises:
        ValueError: The checkpoint is already quantised.
        ImportError: See ``require_bitsandbytes``.
    """
    asked = kwargs.get("quantization_config")
    if kwargs.get("load_in_8bit") or kwargs.get("load_in_4bit"):
        asked = asked or {"quant_method": "bitsandbytes"}
    stored = None if name_or_path is None else stored_quantization(name_or_path, kwargs)
    if asked is not None and stored is not None:
        raise OpenVLAValueError(
            f"{name_or_path} is already quantised; leave quantization_config (or bits) out, or load the checkpoint "
            "that it was made from."
        )
    if _method(asked if asked is not None else stored) == "bitsandbytes":
        require_bitsandbytes()
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs[DTYPE_FIELD] = "auto"


def _method(quantization: Any) -> str | None:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    return None if method is None else str(getattr(method, "value", method))


class QuantizedModelMixin:
    """What a model does differently while bitsandbytes holds its weights.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first prediction, rounds their scales to
    bfloat16 and computes in it, whatever the compute dtype: where that is another, it is kept from doing so. What it
    puts back when the model is saved or trained is not what was there, and without double quantisation it is wrong
    altogether. So the scales as loaded are kept (1.6 % of the weights, 6 % without double quantisation), and put back
    before anything reads them.
    """

    def _after_loading(self) -> None:
        """Check the scales, keep what repacking would overwrite, silence what bitsandbytes logs at every product.

        Repacking crashes on sizes that it cannot divide, such as SigLIP's 4304, and its kernel knows bfloat16 alone;
        other layers are left as they are.

        Raises:
            ValueError: Scales are missing, which transformers does not always notice.
        """
        wrong = [name for name, module in self.named_modules() if not _has_its_scales(module)]
        if wrong:
            raise OpenVLAValueError(f"The checkpoint lacks quantisation scales of {len(wrong)} modules: {wrong}.")
        if getattr(self, "is_loaded_in_8bit", False):
            bitsandbytes_log = logging.getLogger("bitsandbytes.autograd._functions")
            if _not_the_float16_line not in bitsandbytes_log.filters:
                bitsandbytes_log.addFilter(_not_the_float16_line)
            if any(type(p).__name__ == "Int8Params" and p.device.type == "cpu" for p in self.parameters()):
                transformers_logging.get_logger(__name__).warning_once(SLOW_ON_CPU)
        for module in self.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                module.loaded_quant_state = copy.copy(state)
                rows, columns = state.shape
                packs = rows % CPU_PACKING_ROWS == 0 and columns % state.blocksize == 0
                if not packs or module.compute_dtype is not torch.bfloat16:
                    module.support_avx512bf16_for_cpu = False

    def _undo_cpu_packing(self) -> None:
        """Give repacked 4-bit weights the layout and the very scales that they were loaded with."""
        for module in self.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if not getattr(state, "packing_format_for_cpu", False):
                continue
            loaded = getattr(module, "loaded_quant_state", None)
            if loaded is None:
                raise OpenVLAValueError(
                    "These 4-bit weights were repacked for the CPU before this model could keep their scales, so they "
                    "can no longer be saved or trained exactly; load them again with from_pretrained."
                )
            state.original_nested = False  # the scales are put back below, not recomputed
            unpack = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
            module.weight.data, _ = unpack(module.weight.data, state)
            module.weight.quant_state = module.quant_state = copy.copy(loaded)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._undo_cpu_packing()
        return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self._undo_cpu_packing()
        return super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Move or cast, as torch does; a quantised model stays as it was loaded.

        Raises:
            ValueError: Another device, or a dtype, for a quantised model.
        """
        if is_quantized(self):
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            here = next(self.parameters()).device
            moves = device is not None and (device.type, device.index or 0) != (here.type, here.index or 0)
            if moves or dtype is not None:
                raise OpenVLAValueError(
                    f"A quantised model stays on the device and in the dtype that it was loaded with ({here}); load it "
                    "where it should be, from_pretrained(..., device_map={'': 'cuda'}), and leave .to() out."
                )
            return self
        return super().to(*args, **kwargs)

    def cuda(self, device: int | str | torch.device | None = None) -> nn.Module:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")


def _has_its_scales(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params":
        return getattr(weight, "SCB", None) is not None and weight.SCB.numel() == weight.shape[0]
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        blocks = -(-state.shape.numel() // state.blocksize)
        return state.absmax.numel() == blocks and state.absmax.is_floating_point() != bool(state.nested)
    return True


def _not_the_float16_line(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in str(record.msg)
