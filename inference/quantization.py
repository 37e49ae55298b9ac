"""Choice of the 8- or 4-bit format and of the dtype in which a model is loaded."""

from __future__ import annotations

import importlib

import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..heads_openvla import HEAD_MODULES
from ..quantization_openvla import TORCHAO_FORMATS, require_bitsandbytes, require_torchao

# Modules that are never quantised: they turn features into embeddings, hidden states into logits and actions.
# transformers matches such names as prefixes, as suffixes and, in some versions, as regular expressions ("proj" would
# also match every q_proj), and names replace its default, lm_head: hence full names.
UNQUANTIZED_MODULES = ("projector", "language_model.lm_head", *HEAD_MODULES)
VISION_TOWERS = "vision_backbone"
BACKENDS = ("bitsandbytes", "torchao")
QUANT_TYPES = ("nf4", "fp4")
TORCHAO_TYPES = tuple(TORCHAO_FORMATS.values())
FLOAT8_CAPABILITY = (8, 9)  # of Nvidia's GPUs: Ada and Hopper, the first that multiply in float8


def quantization_config(
    bits: int,
    *,
    backend: str = "bitsandbytes",
    device: str | torch.device | None = None,
    double_quant: bool | None = None,
    quant_type: str | None = None,
    compute_dtype: torch.dtype | None = None,
    towers: bool = False,
) -> QuantizationConfigMixin:
    """Return a ``quantization_config`` for ``from_pretrained``: 8- or 4-bit weights of the language model.

    Args:
        bits: 8 or 4.
        backend: "bitsandbytes" (8 bits: LLM.int8), whose models can also be trained with adapters; or "torchao", 8 bits
            for prediction only. torchao's int8 and float8 quantise the inputs of a product too, each row by itself, so
            that a sample's result does not depend on the others of its batch.
        device: torchao only: device that the model will be on. None is the GPU if there is one, else the CPU.
        double_quant: 4 bits only: quantise the scales too (None: yes), which takes 0.13 instead of 0.5 further bits a
            weight.
        quant_type: 4 bits: "nf4" (the default) or "fp4". torchao: "float8" (the default on a GPU that multiplies in it,
            compute capability 8.9 or later; weights must be loaded in bfloat16) or "int8" (the default elsewhere).
        compute_dtype: 4 bits only: the dtype of the products; None is bfloat16 where the hardware has it, else float16
            on a GPU and float32 on a CPU. (LLM.int8 always computes in float16.)
        towers: Quantise the vision towers too.

    Raises:
        ValueError: Another number of bits, back end or type, or an argument that these bits or this back end ignore.
        ImportError: The back end is not installed, or this transformers cannot use it on this machine.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise OpenVLAValueError(f"bits must be 8 or 4, got {bits!r}; leave the quantization out for full precision.")
    if backend not in BACKENDS:
        raise OpenVLAValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}.")
    if backend == "torchao" and bits == 4:
        raise OpenVLAValueError("backend='torchao' is for bits=8; 4-bit weights are bitsandbytes', leave backend out.")
    types = TORCHAO_TYPES if backend == "torchao" else QUANT_TYPES
    if quant_type not in (None, *types):
        raise OpenVLAValueError(f"quant_type must be one of {list(types)} with {backend}, got {quant_type!r}.")
    only_4_bits = {"double_quant": double_quant, "quant_type": quant_type, "compute_dtype": compute_dtype}
    if backend == "torchao":
        del only_4_bits["quant_type"]
    unused = [name for name, value in only_4_bits.items() if value is not None]
    if bits == 8 and unused:
        computes = "in their own format" if backend == "torchao" else "in float16"
        raise OpenVLAValueError(f"{', '.join(unused)}: of 4 bits only, leave it out; 8-bit weights compute {computes}.")
    if backend == "bitsandbytes" and device is not None:
        raise OpenVLAValueError("device is for backend='torchao', leave it out.")
    skip_modules = [*UNQUANTIZED_MODULES] if towers else [VISION_TOWERS, *UNQUANTIZED_MODULES]
    if backend == "torchao":
        return _torchao_config(quant_type, device, skip_modules)
    require_bitsandbytes()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type or QUANT_TYPES[0],
        bnb_4bit_use_double_quant=double_quant is not False,
        bnb_4bit_compute_dtype=compute_dtype or fast_dtype(),
        llm_int8_skip_modules=skip_modules,
    )


def default_backend(bits: int, device: str | torch.device | None = None) -> str:
    """Return the library that ``load_policy`` quantises with where none is named.

    For 8 bits it is torchao where it is installed and this transformers saves its weights, on a CPU or on a GPU with
    float8 products; else, and for 4 bits, bitsandbytes. torchao's int8 is not the default on a GPU: torchao 0.18 prints
    the inputs of every product to a string, which waits for the GPU and rules out CUDA graphs (pytorch/ao#4872), and up
    to 16 rows, as in every decode step, it multiplies a float32 copy of the weights.

    Args:
        bits: 8 or 4.
        device: Device of the model; None is the GPU if there is one, else the CPU.
    """
    if bits != 8 or not (_device(device).type == "cpu" or has_float8(device)):
        return "bitsandbytes"
    try:
        require_torchao()
    except OpenVLAImportError:
        return "bitsandbytes"
    return "torchao"


def has_float8(device: str | torch.device | None = None) -> bool:
    """Return whether a device (None: the GPU if there is one) is a GPU with float8 products."""
    device = _device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _torchao_config(
    quant_type: str | None, device: str | torch.device | None, skip_modules: list[str]
) -> QuantizationConfigMixin:
    """Return the ``quantization_config`` of torchao for a device; its format where none is named."""
    require_torchao()
    device = _device(device)
    if quant_type == "float8" and not has_float8(device):
        raise OpenVLAValueError(f"{device} cannot quantise to float8; take quant_type='int8', or leave it out.")
    library = importlib.import_module("torchao.quantization")
    class_names = {name: class_name for class_name, name in TORCHAO_FORMATS.items()}
    settings_class = getattr(library, class_names[quant_type or ("float8" if has_float8(device) else "int8")])
    # set_inductor_config would change how torch.compile compiles everything else in the process.
    settings = settings_class(granularity=library.PerRow(), set_inductor_config=False)
    config: QuantizationConfigMixin = transformers.TorchAoConfig(settings, modules_to_not_convert=skip_modules)
    return config


def fast_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """Return bfloat16 where the hardware has it; else float16 on a GPU and float32 on a CPU."""
    if torch.device(device or "cuda").type == "cuda" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(check and check())
