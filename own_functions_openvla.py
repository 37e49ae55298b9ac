"""Tell whether a language model still runs the functions and numbers that transformers gave it.

The fast decoder computes what transformers' classes compute without calling them. Where somebody put another function
into a class, a module or transformers' table of attention functions, or changed a number such as the scaling of
attention, the fast decoder would ignore it: then the model's own forward must run.
"""

from __future__ import annotations

import functools
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import Cache

# A function whose code lies in none of these folders was put in the place of torch's or transformers' own.
LIBRARIES = tuple(os.path.dirname(library.__file__) + os.sep for library in (torch, transformers))
# Modules of transformers, beside the language model's own, whose functions call further functions of themselves.
CALLED_MODULES = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")
CALLED_MODULES += ("transformers.integrations.sdpa_attention", "transformers.cache_utils")
# Callable objects of these modules stand beside functions of their name: activations, wrappers of the kernels library.
OBJECTS = ("transformers.activations", "kernels.")
Place = tuple[Mapping[str, Any], str, str]  # dictionary of a class, module or table; name in it; name of the function


def patched_function(language_model: nn.Module) -> str | None:
    """Return which function of a language model is not transformers' or torch's own; None where all are.

    Looked at: methods of the classes of its parts, functions and caches that these use by name, the entries for "sdpa"
    in transformers' tables of attention and mask functions.
    """
    decoder = language_model.get_decoder()
    layer = decoder.layers[0]
    parts = (language_model, decoder, rotary_of(decoder), decoder.norm, layer.input_layernorm, layer.mlp.act_fn)
    kinds = {type(part) for layer in decoder.layers for part in (layer, layer.self_attn, layer.mlp)}
    if not all(_is_of_library(kind) for kind in kinds):
        return "a part of its layers is of a class that is not transformers' own"
    if not _is_own(vars(nn.Module).get("_call_impl"), ""):  # that every __call__ of torch goes on to
        return "Module._call_impl is not torch's own"
    for kind in {nn.Linear, *map(type, parts), *kinds}:
        if not _is_own(kind.__call__, ""):
            return f"{kind.__name__}.__call__ is not torch's own"
        for holder, name, own_name in _places(kind):
            if not _is_own(holder.get(name), own_name):
                _places.cache_clear()  # what stands there now calls other functions
                return f"{name}, which {kind.__name__} runs, is not transformers' own"
    return None


def changed_number(language_model: nn.Module) -> str | None:
    """Return which number of attention or rotary positions differs from the configuration's; None where none does.

    Or which number of the configuration was changed in a way that transformers' forward heeds at every call.
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
        attention = layer.self_attn
        numbers = attention.__dict__  # without the machinery of a module's attributes, for every action
        if numbers.get("scaling", scaling) != scaling or numbers.get("is_causal", True) is not True:
            return "the scaling or the causality of its attention was changed"
        if numbers.get("config", config) is not config:
            return "a layer has a configuration of its own"
        own = numbers["_modules"].get("rotary_emb", rotary)  # every layer has one on transformers before 4.48
        if own is not rotary and not _turns_alike(own, rotary):
            return "a layer has rotary positions of its own"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Return whether a call of this module does more than its class says.

    That is hooks, also those of all modules of the process, accelerate's, or another method put on the instance.
    """
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    hooks = hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(hooks or "_hf_hook" in own or not _methods(type(module)).isdisjoint(own))


def any_hooked(layer: nn.Module) -> bool:
    """Return whether a layer, its attention, its MLP or one of their parts is hooked; see ``is_hooked``."""
    for part in (layer, layer.self_attn, layer.mlp):
        if is_hooked(part):
            return True
        for child in part.__dict__["_modules"].values():
            own = child.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own:
                return True
    return False


def rotary_of(decoder: nn.Module) -> nn.Module:
    """Return the rotary embedding: the decoder's, or on transformers before 4.48 the first layer's."""
    return getattr(decoder, "rotary_emb", None) or decoder.layers[0].self_attn.rotary_emb


def head_dim(config: Any) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _turns_alike(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two rotary embeddings are equal; their frequencies are compared again after each write to them."""
    if is_hooked(one) or type(one) is not type(other):
        return False
    pair = (one.inv_freq, other.inv_freq)
    if any(tensor.is_meta for tensor in pair):  # no numbers, and no action
        return True
    if any(tensor.is_inference() for tensor in pair):  # these do not count writes
        return torch.equal(*pair)
    writes = tuple((id(tensor), tensor._version) for tensor in pair)
    if one.__dict__.get("_equal_at_writes") != writes:
        if not torch.equal(*pair):
            return False
        one.__dict__["_equal_at_writes"] = writes
    return True


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Return the names of forward and of the functions that a class defines in its own module."""
    bases = [base for base in kind.__mro__ if base.__module__ == kind.__module__]
    return frozenset(["forward", *(name for base in bases for name, value in vars(base).items() if callable(value))])


def _is_of_library(kind: type) -> bool:
    return kind.__module__.startswith(("torch.", "transformers."))


@functools.cache
def _places(kind: type) -> tuple[Place, ...]:
    """Return where the functions stand that a module of this class runs, and the name that each was defined with."""
    places: list[Place] = []
    seen: set[int] = set()
    for base in kind.__mro__:
        if base.__module__ == kind.__module__:
            places.extend(_methods_of(base, kind.__module__, seen))
    return tuple(places)


def _methods_of(kind: type, module: str, seen: set[int]) -> Iterator[Place]:
    """Yield the places of the methods that a class defines, and of what they use by name."""
    for name, value in vars(kind).items():
        if list(_unwrapped(value)) and name != "__init__":
            yield vars(kind), name, f"{kind.__qualname__}.{name}"
            yield from _called(value, module, seen)


def _cache_methods(kind: type, module: str, seen: set[int]) -> Iterator[Place]:
    """Yield the places of the methods that a cache or one of its layers has or inherits, and of what they use."""
    dictionaries = [vars(base) for base in kind.__mro__ if base.__module__ == Cache.__module__]
    own = ChainMap(*dictionaries)  
    for name, value in own.items():
        if list(_unwrapped(value)):
            if not name.startswith("__"):  # a dataclass generates some of those
                yield own, name, ""
            yield from _called(value, module, seen)


def _called(value: Any, module: str, seen: set[int]) -> Iterator[Place]:
    """Yield the places of functions and table entries that a function uses by name, and of those that they use."""
    for function in _unwrapped(value):
        space = function.__globals__
        for name in function.__code__.co_names:
            used = space.get(name)
            if id(used) in seen or type(used).__module__.startswith(OBJECTS):
                continue
            if isinstance(used, type):
                if issubclass(used, Cache) or (space["__name__"] == Cache.__module__ and hasattr(used, "update")):
                    seen.add(id(used))
                    yield space, name, name
                    yield from _cache_methods(used, module, seen)
            elif isinstance(used, Mapping) and "sdpa" in used:
                seen.add(id(used))
                yield used, "sdpa", "sdpa"
                yield from _called(used.get("sdpa"), module, seen)
            elif callable(used) and space.get("__name__") in (module, *CALLED_MODULES):
                seen.add(id(used))
                yield space, name, name
                yield from _called(used, module, seen)


def _unwrapped(value: Any) -> Iterator[FunctionType]:
    """Yield the function of a method or property, and those that its decorators wrap."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


@functools.cache
def _is_own(value: Any, name: str) -> bool:
    """Return whether a function, and all that it wraps, is code of torch or transformers defined under this name.

    Or whether a class is theirs.
    """
    if isinstance(value, type):
        return _is_of_library(value) and value.__name__ == name
    functions = list(_unwrapped(value))
    in_library = all(function.__code__.co_filename.startswith(LIBRARIES) for function in functions)
    return bool(functions) and in_library and functions[-1].__qualname__.startswith(name)
