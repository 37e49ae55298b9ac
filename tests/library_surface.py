"""List of every unstable name of other libraries that this package uses: where, and what to change if it goes.

``test_library_surface.py`` runs every check by its name, before any other test. Nothing here imports ``openvla``, so
that the list works where that import fails; no check uses the name of another one, so that one renamed name fails one
check. "4.40.1 to 5.24.0" are the versions that were tested: 4.40.1, 4.49.0, 4.57.6, 5.5.4, 5.23.0 and 5.24.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Touch:
    """Name of another library that may change without notice.

    Attributes:
        name: Short and unique; its last part is the name in the library.
        library: The library.
        seen: Versions that have it, with the name in other versions.
        used_in: Files of this package.
        check: Function that raises where the library no longer has the name as it is used.
        change: Change to make in this package, and where.
        renamed: Identifier, and the library's files in which a test renames it to prove the check; or None.
    """

    name: str
    library: str
    seen: str
    used_in: tuple[str, ...]
    check: Callable[[], Any]
    change: str
    renamed: tuple[str, str] | None = None


VERSION = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("transformers"))[:2])
V5 = VERSION >= (5, 0)
ALL, BEFORE_5 = "4.40.1 to 5.24.0", "4.40.1 to 4.57.6"
EVERYWHERE = "**/*.py"
OUTPUTS, LLAMA = "modeling_outputs.py", "models/llama/modeling_llama.py"
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
CACHE_SEEN = "past_key_values 4.40.1 to 5.23.0, cache 5.24.0"
FLASH = "_supports_flash_attn" if VERSION >= (4, 54) else "_supports_flash_attn_2"
REGISTER = "image_processor_classes" if V5 else "slow_image_processor_class"
REGISTER = "image_processor_class" if VERSION < (4, 42) else REGISTER
FAMILIES = ("Llama", "Mistral", "Qwen2")
OUTPUT = "transformers.modeling_outputs:CausalLMOutputWithPast"
BASE_OUTPUT = "transformers.modeling_outputs:BaseModelOutputWithPast"
GENERATED = "transformers.generation.utils:GenerateDecoderOnlyOutput"
ROOT = Path(__file__).parent.parent
MODEL, IMAGES = "transformers:PreTrainedModel.", "transformers.image_processing_utils:BaseImageProcessor."
PROCESSOR, AUTO_FACTORY = "transformers.processing_utils:ProcessorMixin", "transformers.models.auto.auto_factory"
AUTO_IMAGES = "models/auto/image_processing_auto.py"
REGISTER_SEEN = "image_processor_class 4.40.1, slow_image_processor_class 4.49.0, 4.57.6, then image_processor_classes"
AUTO_MODEL = "AutoModelForImageTextToText" if V5 else "AutoModelForVision2Seq"
AUTO_MODEL_SEEN = "AutoModelForVision2Seq 4.40.1 to 4.57.6, AutoModelForImageTextToText 4.49.0 to 5.24.0"
FLASH_SEEN = "_supports_flash_attn_2 4.40.1 and 4.49.0, _supports_flash_attn 4.57.6 to 5.24.0"
CONFIGS, LOGGING = "transformers.configuration_utils", "transformers.utils.logging"
BNB_QUANTIZER, BNB_LOG = "transformers.quantizers.quantizer_bnb", "bitsandbytes.autograd._functions"
ROPE, ROPE_SEEN = "rope_parameters" if V5 else "rope_scaling", "rope_scaling 4.40.1 to 4.57.6, then rope_parameters"
ROPE_TYPE = EVERYWHERE if V5 else None
FAST_TOKENIZER = "TokenizersBackend" if V5 else "PreTrainedTokenizerFast"
FAST_TOKENIZER_SEEN = "PreTrainedTokenizerFast 4.40.1 to 4.57.6, TokenizersBackend 5.5.4 to 5.24.0"
PROCESSOR_PARTS, UNQUANTIZED = ("", "") if V5 else (".attributes", "_pre_quantization_dtype")
DYNAMIC = "transformers.dynamic_module_utils"
HUB_SWITCHES = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
LORA = ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "merged", "disable_adapters")
MODULE_DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
HUB = "transformers.utils.hub:cached_file" + ("s" if VERSION >= (4, 50) else "")


def resolve(path: str) -> Any:
    """Return the object at "module:attribute.attribute"."""
    module, _, attributes = path.partition(":")
    return functools.reduce(getattr, filter(None, attributes.split(".")), importlib.import_module(module))


def has(path: str) -> Callable[[], Any]:
    """Return a check that "module:attribute.attribute" exists."""
    return lambda: resolve(path)


def in_register() -> Any:
    """Return the function that registers an image processor."""
    return resolve("transformers.models.auto.image_processing_auto:AutoImageProcessor.register")


def takes(find: Callable[[], Any], parameter: str) -> Callable[[], Any]:
    """Return a check that a function has a parameter of this name."""

    def check() -> None:
        names = list(inspect.signature(find()).parameters)
        assert parameter in names, f"the parameters are {names}"

    return check


def mentions(module: str, *words: str) -> Callable[[], Any]:
    """Return a check that a module's source has one of the words: for names that no signature shows."""

    def check() -> None:
        source = inspect.getsource(importlib.import_module(module))
        assert any(re.search(rf"\b{word}\b", source) for word in words), f"{module} has none of {words}"

    return check


def has_field(path: str, name: str) -> Callable[[], Any]:
    """Return a check that a dataclass of the library has a field."""

    def check() -> None:
        names = [field.name for field in dataclasses.fields(resolve(path))]
        assert name in names, f"{path} has the fields {names}"

    return check


def holds(make: Callable[[], Any], name: str) -> Callable[[], Any]:
    """Return a check that an object has an attribute; ``make`` creates the object."""
    return lambda: getattr(make(), name)


def config_of(family: str = "Llama") -> Any:
    """Return the configuration of a tiny language model."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    kind = getattr(importlib.import_module("transformers"), f"{family}Config")
    return kind(**sizes, **heads, attn_implementation="eager")


def class_of(family: str, kind: str) -> Any:
    """Return the class whose name begins with family and kind; another check notices where it is renamed."""
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    return next(value for name, value in vars(module).items() if re.fullmatch(rf"{family}{kind}(_.*)?", name))


def part_of(family: str, kind: str) -> nn.Module:
    """Build one module of a language model."""
    arguments = {"RMSNorm": (8,), "Attention": (config_of(family), 0), "DecoderLayer": (config_of(family), 0)}
    return class_of(family, kind)(*arguments.get(kind, (config_of(family),)))


def check_property() -> None:
    """Check that the attention of a configuration is read and set through one property."""
    config = config_of()
    assert isinstance(inspect.getattr_static(type(config), "_attn_implementation"), property)
    config._attn_implementation = "sdpa"
    assert config._attn_implementation == "sdpa"


def check_dtype() -> None:
    """Check under which name a configuration takes its dtype."""
    kind = next(kind for kind in type(config_of()).__mro__ if kind.__module__ == CONFIGS)
    assert ("dtype" in inspect.signature(kind.__init__).parameters) == (VERSION >= (4, 56)), f"{kind}: dtype"
    assert hasattr(config_of(), "dtype" if VERSION >= (4, 56) else "torch_dtype")


def check_order() -> None:
    """Check that a tuple output has its fields in the order in which they are read by index."""
    order = ["loss", "logits", CACHE, "hidden_states", "attentions"]
    names = [field.name for field in dataclasses.fields(resolve(OUTPUT))]
    known = [name for name in names if name in order]
    assert known == [name for name in order if name in names], f"the order is {names}"


def check_subclass() -> None:
    """Check that an output with one more field can be made."""

    @dataclasses.dataclass
    class Wider(resolve(OUTPUT)):
        extra: Any = None

    assert Wider(extra=1)["extra"] == 1


def check_rope_key(name: str) -> None:
    """Check that the rotary settings have a key, in any field of the configuration."""
    fields = vars(config_of())
    inside = any(isinstance(value, dict) and name in value for value in fields.values())
    assert inside or (not V5 and (name in fields or name == "rope_type")), f"no {name} in LlamaConfig"


def check_mask() -> None:
    """Check that a 4-D attention mask, additive or 1 for visible, lets a token attend to a later one."""

    def influence(model: nn.Module, added: bool) -> bool:
        norm = next(child for child in model.children() if getattr(getattr(child, "weight", None), "ndim", 0) == 1)
        seen: list[torch.Tensor] = []
        hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
        x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
        x[1, 2] += 1
        mask = torch.zeros(2, 1, 3, 3) if added else torch.ones(2, 1, 3, 3)
        try:
            model(inputs_embeds=x, attention_mask=mask, use_cache=False)
        except Exception:  # raised after the norm, which other checks notice
            if not seen:
                raise
        hook.remove()
        return not torch.equal(seen[0][0, 0], seen[0][1, 0])

    for family in FAMILIES:
        with contextlib.suppress(TypeError):  # a renamed argument of one family
            model = part_of(family, "Model").eval()
            assert influence(model, True) or influence(model, False), f"{family}Model stays causal under a 4-D mask"
            return
    raise AssertionError("no language model takes a mask in four dimensions")


@functools.cache
def loading_info() -> SimpleNamespace:
    """Return the loading info of a tiny checkpoint."""
    kind = importlib.import_module("transformers").AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(config_of()).save_pretrained(folder)
        return SimpleNamespace(**kind.from_pretrained(folder, output_loading_info=True)[1])


def check_silu() -> None:
    """Check that the gate's activation is of a class that the fast decoder supports."""
    name = type(resolve("transformers.activations:ACT2FN")["silu"]).__name__
    assert name in ("SiLU", "SiLUActivation"), f"ACT2FN['silu'] is a {name}"


@functools.cache
def adapted() -> nn.Module:
    """Build a model with LoRA on a linear layer and an embedding, and a module that is trained in full."""
    peft = importlib.import_module("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["1"])
    return peft.inject_adapter_in_model(config, model, adapter_name="default")


@functools.cache
def quantized() -> nn.Module:
    """Build a linear layer with 4-bit weights."""
    return importlib.import_module("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")


def hooked() -> nn.Module:
    """Build a module with a hook of accelerate."""
    hooks = importlib.import_module("accelerate.hooks")
    return hooks.add_hook_to_module(nn.Linear(2, 2), hooks.ModelHook())


def dispatched() -> nn.Module:
    """Build a model that accelerate has placed on devices."""
    return importlib.import_module("accelerate").dispatch_model(nn.Sequential(nn.Linear(2, 2)), device_map={"": "cpu"})


def mapped_storage() -> torch.UntypedStorage:
    """Return the storage of a tensor that was loaded without its data."""
    fake = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.ones(3), Path(folder) / "x.pt")
        with fake():
            return torch.load(Path(folder) / "x.pt", weights_only=True).untyped_storage()


def check_onednn(name: str) -> None:
    """Check that torch has an operation of oneDNN, where it has oneDNN."""
    assert not torch.backends.mkldnn.is_available() or hasattr(torch.ops.mkldnn, name), f"torch.ops.mkldnn.{name}"


Row = tuple[str, Callable[[], Any], str | None, str]


def row(name: str, check: Callable[[], Any], where: str | None = EVERYWHERE, seen: str = ALL) -> Row:
    """Return the fields that differ between touches; a test renames the name in the files ``where``, if not None."""
    return name, check, where, seen


def members(prefix: str, path: str, *names: str, where: str = EVERYWHERE, seen: str = ALL) -> list[Row]:
    """Return a row for each name that exists at path + name."""
    return [row(f"{prefix}{name}", has(f"{path}{name}"), where, seen) for name in names]


def parts(prefix: str, make: Callable[[], Any], *names: str, where: str | None = EVERYWHERE) -> list[Row]:
    """Return a row for each attribute of the object that ``make`` creates."""
    return [row(f"{prefix}{name}", holds(make, name), where) for name in names]


def touches(used_in: str, change: str, *each: Row, library: str = "transformers") -> tuple[Touch, ...]:
    """Return touches that are used in the same files and need the same change.

    Args:
        used_in: Names of files, without ".py"; of several, those that contain the last part of the name.
        change: Text with "{name}" for the last part of the name and "{files}" for the files.
        *each: Results of ``row``.
        library: The library.
    """
    texts = {f"{name}.py": (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in used_in.split()}
    result = []
    for name, check, where, seen in each:
        last = name.rpartition(".")[2]
        files = tuple(file for file, text in texts.items() if re.search(rf"\b{last}\b", text)) or tuple(texts)
        proof = (last, where) if where and library == "transformers" else None
        text = change.format(name=last, files=", ".join(files))
        result.append(Touch(name, library, seen, files, check, text, proof))
    return tuple(result)


# Attributes of a language model that the fast decoder reads, by class.
PARTS = {
    "Attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "DecoderLayer": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    "RMSNorm": ("variance_epsilon",),
    "Model": ("layers", "norm"),
}


def layers() -> tuple[Touch, ...]:
    """Return the attributes of the language models' layers that the fast decoder reads.

    Only those of Llama are renamed by a test, which takes seconds each: the others have the same check.
    """
    rows = []
    for family in FAMILIES:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}:"
        rows += members("", module, *(f"{family}{kind}" for kind in PARTS if kind != "Model"), f"{family}ForCausalLM")
        for kind, names in PARTS.items():
            where = LLAMA if family == "Llama" else None
            rows += parts(f"{family}{kind}.", functools.partial(part_of, family, kind), *names, where=where)
    rows.append(row("SiLUActivation", check_silu, seen="SiLU 4.40.1 and 4.49.0, SiLUActivation 4.57.6 to 5.24.0"))
    change = (
        "Write the layers out with the new name of {name}, or drop the family: _Layer in inference/fast_decoder.py."
    )
    return touches("inference/fast_decoder parallel_openvla", change, *rows)


def forwards() -> tuple[Touch, ...]:
    """Return the name of the cache argument in the forward of every language model."""
    rows = []
    for name in (*FAMILIES, "Phi"):
        check = takes(lambda name=name: class_of(name, "ForCausalLM").forward, CACHE)
        file = f"models/{name.lower()}/modeling_{name.lower()}.py"
        rows.append(row(f"{name}ForCausalLM.forward.{CACHE}", check, file, CACHE_SEEN))
    change = "Give the language model its cache under the new name of {name}: CACHE_FIELD in compatibility_openvla.py."
    return touches("compatibility_openvla decoding_openvla prismatic_openvla", change, *rows)


SURFACE: tuple[Touch, ...] = (
    *touches(
        "compatibility_openvla decoding_openvla prismatic_openvla parallel_openvla",
        "Read and build outputs with the new name of {name}: CACHE_FIELD in compatibility_openvla.py for the cache, "
        "forward in prismatic_openvla.py and loss_at_labels for the others.",
        *(row(f"ModelOutput.{name}", has_field(OUTPUT, name), OUTPUTS) for name in ("loss", "logits")),
        row(f"ModelOutput.{CACHE}", has_field(OUTPUT, CACHE), OUTPUTS, CACHE_SEEN),
        *(row(f"ModelOutput.{name}", has_field(OUTPUT, name), OUTPUTS) for name in ("hidden_states", "attentions")),
        row("ModelOutput.last_hidden_state", has_field(BASE_OUTPUT, "last_hidden_state"), OUTPUTS),
        # No test renames these: an order, a construction and a convention are no identifiers.
        row("ModelOutput: the order of fields", check_order, None),
        row("ModelOutput: a subclass with a field more", check_subclass, None),
        row("attention_mask: four dimensions", check_mask, None),
    ),
    *forwards(),
    *touches(
        "prismatic_openvla modeling_openvla",
        "Read {name} of what generate() gives under its new name: generate in prismatic_openvla.py, "
        "_generate_tokens in modeling_openvla.py.",
        *(row(f"generate.{n}", has_field(GENERATED, n), "generation/utils.py") for n in ("sequences", "logits")),
    ),
    *touches(
        "adapters/peft_methods",
        "Use the new name of {name} in require_peft_of_transformers.",
        row("MIN_PEFT_VERSION", has("transformers.integrations.peft:MIN_PEFT_VERSION")),
    ),
    *touches(
        "compatibility_openvla",
        "Use the new name of {name}, in the constant or function of compatibility_openvla.py that reads it.",
        row("DynamicCache.get_seq_length", has("transformers:DynamicCache.get_seq_length")),
        row("PretrainedConfig._attn_implementation", check_property),
        row("PretrainedConfig._attn_implementation_internal", holds(config_of, "_attn_implementation_internal")),
        row("MODEL_FOR_CAUSAL_LM_MAPPING", has("transformers:MODEL_FOR_CAUSAL_LM_MAPPING")),
        # No test renames it: it would rename torch's keyword too.
        row("PretrainedConfig.dtype", check_dtype, None, "torch_dtype 4.40.1 and 4.49.0, dtype 4.57.6 to 5.24.0"),
    ),
    *touches(
        "inference/fast_decoder configuration_openvla",
        "Read {name} from its new place, in {files}: _rotary_fields, unsupported_reason, _for_every_version.",
        row(f"PretrainedConfig.{ROPE}", holds(config_of, ROPE), seen=ROPE_SEEN),
        row("rope_parameters.rope_theta", functools.partial(check_rope_key, "rope_theta")),
        row("rope_parameters.rope_type", functools.partial(check_rope_key, "rope_type"), ROPE_TYPE, "5.5.4 to 5.24.0"),
    ),
    *touches(
        "compatibility_openvla vision_openvla",
        "Set and ask for the new name of {name} in {files}: VisionTower, is_checkpointing.",
        row("LlamaModel.gradient_checkpointing", holds(lambda: part_of("Llama", "Model"), "gradient_checkpointing")),
    ),
    *touches(
        "prismatic_openvla compatibility_openvla loading",
        "Say the new name of {name} beside the old one in PrismaticPreTrainedModel (prismatic_openvla.py).",
        *members("PreTrainedModel.", MODEL, "_init_weights", "_from_config", "_no_split_modules", "_supports_sdpa"),
        *members("PreTrainedModel.", MODEL, "_skip_keys_device_placement", "_tied_weights_keys", "base_model_prefix"),
        *members("PreTrainedModel.", MODEL, "supports_gradient_checkpointing"),
        *members("PreTrainedModel.", MODEL, "_auto_class", where="modeling_utils.py"),
        row(f"PreTrainedModel.{FLASH}", has(f"{MODEL}{FLASH}"), EVERYWHERE, FLASH_SEEN),
    ),
    *touches(
        "prismatic_openvla",
        "Read {name} of the loading info under its new name: _require_complete in prismatic_openvla.py.",
        *parts("loading_info.", loading_info, "missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"),
    ),
    *touches(
        "processing_openvla loading tiny",
        "Use the new name of {name}, on every version that has it, in {files}.",
        *members("BaseImageProcessor.", IMAGES, "_auto_class", where="image_processing_base.py"),
        *members("ProcessorMixin.", f"{PROCESSOR}.", "_auto_class", where="processing_utils.py"),
        *members("ProcessorMixin.", f"{PROCESSOR}.", "_get_arguments_from_pretrained"),
        row(f"AutoImageProcessor.register.{REGISTER}", takes(in_register, REGISTER), AUTO_IMAGES, REGISTER_SEEN),
        *members("", "transformers:", AUTO_MODEL, seen=AUTO_MODEL_SEEN),
        # No test renames it: 5.x finds names that end in Fast in several ways, so a renamed one is not noticed.
        row("PreTrainedTokenizerFast", has("transformers:PreTrainedTokenizerFast"), None),
        row("TokenizersBackend", has(f"transformers:{FAST_TOKENIZER}"), seen=FAST_TOKENIZER_SEEN),
        # No test renames it: 5.x does without.
        row("ProcessorMixin.attributes", has(f"{PROCESSOR}{PROCESSOR_PARTS}"), None, BEFORE_5),
    ),
    *touches(
        "adapters/base_record adapters/lora adapters/peft_methods configuration_openvla modeling_openvla "
        "training/export quantization_openvla prismatic_openvla inference/cuda_graphs conversion/assemble",
        "Use the replacement of {name} in {files}; where versions differ, by a function in compatibility_openvla.py.",
        *members("", "transformers:", "CONFIG_MAPPING", "PretrainedConfig"),
        *members("", "transformers.utils:", "cached_file", "is_flash_attn_2_available"),
        *members("", "transformers.utils.hub:", "extract_commit_hash"),
        *members("PretrainedConfig.", "transformers:LlamaConfig.", "to_diff_dict", "get_config_dict"),
        row("PretrainedConfig._name_or_path", holds(config_of, "_name_or_path")),
        row("PretrainedConfig._commit_hash", mentions(CONFIGS, "_commit_hash")),
        row("PretrainedConfig.auto_map", mentions(DYNAMIC, "auto_map")),
        # No test renames it: 5.x no longer has it, and nothing is missing there.
        row("PretrainedConfig._pre_quantization_dtype", mentions(CONFIGS, UNQUANTIZED), None, BEFORE_5),
        *(row(f"cached_file.{name}", takes(functools.partial(resolve, HUB), name)) for name in HUB_SWITCHES),
        row("logging.warning_once", holds(lambda: resolve(f"{LOGGING}:get_logger")("transformers.x"), "warning_once")),
        row("custom_object_save", takes(lambda: resolve(f"{DYNAMIC}:custom_object_save"), "config")),
        row("adapter_kwargs._adapter_model_path", mentions(AUTO_FACTORY, "_adapter_model_path")),
        *members("PeftAdapterMixin.", "transformers.integrations.peft:PeftAdapterMixin.", "_hf_peft_config_loaded"),
        *(row(f"is_loaded_in_{n}bit", mentions(f"{BNB_QUANTIZER}_{n}bit", f"is_loaded_in_{n}bit")) for n in (8, 4)),
        row("quantization_method", mentions("transformers.quantizers.base", "quantization_method")),
        row("transformers_modules", mentions("transformers.utils.hub", "transformers_modules")),
    ),
    *layers(),
    *touches(
        "adapters/lora adapters/peft_methods conversion/merge inference/cpu_prepack",
        "Look at peft's layers under the new name of {name}, and under the old one for older peft, in {files}.",
        *members("peft.", "peft:", "inject_adapter_in_model"),
        *members("peft.", "peft.tuners.tuners_utils:", "BaseTunerLayer"),
        *members("peft.", "peft.utils:", "ModulesToSaveWrapper"),
        *parts("lora.Linear.", lambda: adapted()[0], "enable_adapters", *LORA),
        *parts("lora.Embedding.", lambda: adapted()[2], "lora_embedding_A", "lora_embedding_B"),
        *parts("ModulesToSaveWrapper.", lambda: adapted()[1], "modules_to_save", "original_module", "enable_adapters"),
        row("model.peft_config", holds(adapted, "peft_config")),
        library="peft",
    ),
    *touches(
        "quantization_openvla inference/quantized_weights inference/fast_decoder",
        "Use the new name of {name} in _has_scales (quantization_openvla.py) and inference/quantized_weights.py.",
        *members("bitsandbytes.", "bitsandbytes.nn:", "Linear8bitLt", "Int8Params", "Params4bit"),
        row("Int8Params.SCB", mentions("bitsandbytes.nn.modules", "SCB")),
        row("Params4bit.quant_state", holds(lambda: quantized().weight, "quant_state")),
        *parts("QuantState.", lambda: quantized().weight.quant_state, "absmax", "nested", "blocksize", "shape"),
        row("Linear4bit.support_avx512bf16_for_cpu", holds(quantized, "support_avx512bf16_for_cpu")),
        row("QuantState.packing_format_for_cpu", mentions("bitsandbytes.functional", "packing_format_for_cpu")),
        row("QuantState.original_nested", mentions("bitsandbytes.functional", "original_nested")),
        *members("bitsandbytes.", "bitsandbytes.functional:", "_convert_weight_packed_for_cpu_inverse"),
        row(BNB_LOG, mentions(BNB_LOG, "inputs will be cast from")),
        library="bitsandbytes",
    ),
    *touches(
        "inference/cuda_graphs training/layers inference/patch_detection parallel_openvla inference/cpu_prepack "
        "inference/quantized_weights inference/quantization conversion/torch_archive vq_openvla",
        "Use the replacement of {name} in {files}, and the old one where torch still has it.",
        *parts("nn.Module.", lambda: SimpleNamespace(**nn.Linear(1, 1).__dict__), *MODULE_DICTS),
        *members("nn.Module.", "torch.nn:Module.", "_save_to_state_dict", "_load_from_state_dict", "_apply"),
        *members("torch.", "torch:", "Tensor._version", "_C._nn._parse_to"),
        *(row(f"torch.ops.mkldnn.{name}", functools.partial(check_onednn, name)) for name in ONEDNN),
        *members("torch._inductor.config.", "torch._inductor.config:", "emulate_precision_casts"),
        *members("torch._dynamo.", "torch._dynamo:", "lookup_backend", "config"),
        *members("dynamo.", "torch._dynamo.config:", "cache_size_limit", "patch"),
        *members("torch._subclasses.fake_tensor.", "torch._subclasses.fake_tensor:", "FakeTensorMode"),
        *members("torch.", "torch.nn.modules.module:", "_global_forward_hooks", "_global_forward_pre_hooks"),
        row("UntypedStorage._checkpoint_offset", holds(mapped_storage, "_checkpoint_offset")),
        library="torch",
    ),
    *touches(
        "inference/patch_detection inference/cuda_graphs prismatic_openvla",
        "Ask for the new name of {name}: is_hooked in inference/patch_detection.py, _is_supported in "
        "inference/cuda_graphs.py, _left_empty in prismatic_openvla.py.",
        row("nn.Module._hf_hook", holds(hooked, "_hf_hook")),
        row("PreTrainedModel.hf_device_map", holds(dispatched, "hf_device_map")),
        library="accelerate",
    ),
)
