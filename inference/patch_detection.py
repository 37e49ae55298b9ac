"""Detection of patched language models: functions or numbers that are not the ones of transformers.

The fast decoder computes what transformers' classes compute without calling them. If a user replaced a function in a
class, a module or transformers' table of attention functions, or changed a number such as the attention scaling, the
fast decoder would ignore it; then the model's own forward must run.
"""

from __future__ import annotations

import functools
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import Cache

# A function whose code lies in none of these folders replaced one of torch or transformers.
LIBRARY_FOLDERS = tuple(os.path.dirname(str(library.__file__)) + os.sep for library in (torch, transformers))
# Modules of transformers, besides the language model's own, whose functions call further functions of the same module.
CALLED_MODULES: tuple[str, ...] = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")
CALLED_MODULES += ("transformers.integrations.sdpa_attention", "transformers.cache_utils")
# Callable objects of these modules are no functions: activations, wrappers of the kernels library.
OBJECT_MODULES = ("transformers.activations", "kernels.")


class FunctionSlot(NamedTuple):
    """A namespace entry that holds a function which a language model calls.

    Attributes:
        namespace: Dictionary of a class, a module or a table.
        key: Name in it.
        qualname: Name that the function was defined with; a prefix is enough.
    """

    namespace: Mapping[str, Any]
    key: str
    qualname: str


def patched_function(language_model: Any) -> str | None:
    """Return which function of a language model is not transformers' or torch's; None where all are.

    Checked are the methods of the classes of its parts, the functions and caches that these use by name, and the
    entries for "sdpa" in transformers' tables of attention and mask functions.
    """
    decoder = language_model.get_decoder()
    layer = decoder.layers[0]
    parts = (language_model, decoder, rotary_of(decoder), decoder.norm, layer.input_layernorm, layer.mlp.act_fn)
    kinds = {type(part) for layer in decoder.layers for part in (layer, layer.self_attn, layer.mlp)}
    if not all(_is_library_class(kind) for kind in kinds):
        return "a part of its layers is of a class that is not transformers' own"
    if not _is_original(vars(nn.Module).get("_call_impl"), ""):  # every __call__ of torch leads there
        return "Module._call_impl is not torch's own"
    all_kinds: set[Any] = {nn.Linear, *map(type, parts), *kinds}
    for kind in all_kinds:
        if not _is_original(kind.__call__, ""):
            return f"{kind.__name__}.__call__ is not torch's own"
        for namespace, key, qualname in _function_slots(kind):
            if not _is_original(namespace.get(key), qualname):
                _function_slots.cache_clear()  # the replacement calls other functions
                return f"{key}, which {kind.__name__} runs, is not transformers' own"
    return None


def changed_number(language_model: Any) -> str | None:
    """Return which number differs from the one that transformers computes with by default; None where none does.

    Checked are the numbers of attention and rotary positions against the configuration, and those numbers of the
    configuration that transformers' forward reads at every call.
    """
    config, decoder = language_model.config, language_model.get_decoder()
    if config.num_hidden_layers < len(decoder.layers):
        return f"its configuration has {config.num_hidden_layers} of its {len(decoder.layers)} layers run"
    if not getattr(config, "is_causal", True):
        return "its attention sees later positions (is_causal)"
    if getattr(config, "attention_chunk_size", None):
        return "its attention sees chunks (attention_chunk_size)"
    scaling, rotary = head_dim(config) ** -0.5, rotary_of(decoder)
    if is_hooked(rotary) or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        return "its rotary positions were changed"
    for layer in decoder.layers:
        attributes = layer.self_attn.__dict__  # attribute access of nn.Module is too slow for every prediction
        if attributes.get("scaling", scaling) != scaling or attributes.get("is_causal", True) is not True:
            return "the scaling or the causality of its attention was changed"
        if attributes.get("config", config) is not config:
            return "a layer has a configuration of its own"
        # Before transformers 4.48 every layer has a rotary embedding.
        layer_rotary = attributes["_modules"].get("rotary_emb", rotary)
        if layer_rotary is not rotary and not _have_equal_frequencies(layer_rotary, rotary):
            return "a layer has rotary positions of its own"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Return whether a call of this module does more than its class defines.

    That is where it or all modules of the process have hooks, accelerate has hooked it, or a method was replaced on
    the instance.
    """
    kind: Any = type(module)
    attributes = module.__dict__
    hooks = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
    hooks = hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(hooks or "_hf_hook" in attributes or not _methods(kind).isdisjoint(attributes))


def any_hooked(layer: Any) -> bool:
    """Return whether a layer, its attention, its MLP or one of their parts is hooked; see ``is_hooked``."""
    for part in (layer, layer.self_attn, layer.mlp):
        if is_hooked(part):
            return True
        for child in part.__dict__["_modules"].values():
            names = child.__dict__
            if names["_forward_hooks"] or names["_forward_pre_hooks"] or "forward" in names or "_hf_hook" in names:
                return True
    return False


def rotary_of(decoder: Any) -> Any:
    """Return the rotary embedding: the decoder's, or on transformers before 4.48 the first layer's."""
    return getattr(decoder, "rotary_emb", None) or decoder.layers[0].self_attn.rotary_emb


def head_dim(config: Any) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _have_equal_frequencies(one: Any, other: Any) -> bool:
    """Return whether two rotary embeddings are equal; frequencies are compared again after each write to them."""
    if is_hooked(one) or type(one) is not type(other):
        return False
    pair = (one.inv_freq, other.inv_freq)
    if any(tensor.is_meta for tensor in pair):  # no values, and no prediction
        return True
    if any(tensor.is_inference() for tensor in pair):  # these do not count writes
        return torch.equal(*pair)
    versions = tuple((id(tensor), tensor._version) for tensor in pair)
    if one.__dict__.get("_equal_at_versions") != versions:
        if not torch.equal(*pair):
            return False
        one.__dict__["_equal_at_versions"] = versions
    return True


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Return "forward" and the names of the functions that a class defines in its own module."""
    bases = [base for base in kind.__mro__ if base.__module__ == kind.__module__]
    return frozenset(["forward", *(name for base in bases for name, value in vars(base).items() if callable(value))])


def _is_library_class(kind: type) -> bool:
    return kind.__module__.startswith(("torch.", "transformers."))


@functools.cache
def _function_slots(kind: type) -> tuple[FunctionSlot, ...]:
    """Return the slots of all functions that a module of this class runs."""
    slots: list[FunctionSlot] = []
    visited: set[int] = set()
    for base in kind.__mro__:
        if base.__module__ == kind.__module__:
            slots.extend(_method_slots(base, kind.__module__, visited))
    return tuple(slots)


def _method_slots(kind: type, module: str, visited: set[int]) -> Iterator[FunctionSlot]:
    """Yield the slots of the methods that a class defines, and of what they use by name."""
    for name, value in vars(kind).items():
        if list(_unwrapped(value)) and name != "__init__":
            yield FunctionSlot(vars(kind), name, f"{kind.__qualname__}.{name}")
            yield from _called_slots(value, module, visited)


def _cache_slots(kind: type, module: str, visited: set[int]) -> Iterator[FunctionSlot]:
    """Yield the slots of the methods that a cache or one of its layers has or inherits, and of what they use."""
    # The dictionaries are read-only views, and nothing is written.
    dictionaries: list[Any] = [vars(base) for base in kind.__mro__ if base.__module__ == Cache.__module__]
    methods: ChainMap[str, Any] = ChainMap(*dictionaries)
    for name, value in methods.items():
        if list(_unwrapped(value)):
            if not name.startswith("__"):  # a dataclass generates some of those
                yield FunctionSlot(methods, name, "")
            yield from _called_slots(value, module, visited)


def _called_slots(value: Any, module: str, visited: set[int]) -> Iterator[FunctionSlot]:
    """Yield the slots of functions and table entries that a function uses by name, and of those that they use."""
    for function in _unwrapped(value):
        namespace = function.__globals__
        for name in function.__code__.co_names:
            used = namespace.get(name)
            if id(used) in visited or type(used).__module__.startswith(OBJECT_MODULES):
                continue
            if isinstance(used, type):
                if issubclass(used, Cache) or (namespace["__name__"] == Cache.__module__ and hasattr(used, "update")):
                    visited.add(id(used))
                    yield FunctionSlot(namespace, name, name)
                    yield from _cache_slots(used, module, visited)
            elif isinstance(used, Mapping) and "sdpa" in used:
                visited.add(id(used))
                yield FunctionSlot(used, "sdpa", "sdpa")
                yield from _called_slots(used.get("sdpa"), module, visited)
            elif callable(used) and namespace.get("__name__") in (module, *CALLED_MODULES):
                visited.add(id(used))
                yield FunctionSlot(namespace, name, name)
                yield from _called_slots(used, module, visited)


def _unwrapped(value: Any) -> Iterator[FunctionType]:
    """Yield the function of a method or property, and those that its decorators wrap."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


@functools.cache
def _is_original(value: Any, qualname: str) -> bool:
    """Return whether a class is torch's or transformers', or a function and all that it wraps is their code.

    The innermost function must be defined under a name that begins with ``qualname``.
    """
    if isinstance(value, type):
        return _is_library_class(value) and value.__name__ == qualname
    functions = list(_unwrapped(value))
    in_library = all(function.__code__.co_filename.startswith(LIBRARY_FOLDERS) for function in functions)
    return bool(functions) and in_library and functions[-1].__qualname__.startswith(qualname)
