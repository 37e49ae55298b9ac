"""Compilation and activation checkpointing of the repeated layers while a model trains.

The layers of a language model are alike, and so are the blocks of a vision tower. Each kind is compiled once, by
``torch.compile`` with static shapes, and that code serves all of its layers: https://docs.pytorch.org/tutorials/recipes/
regional_compilation.html. Checkpointing is ``torch.utils.checkpoint``'s, inside the compiled region.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_openvla import OpenVLAForActionPrediction

logger = logging.get_logger(__name__)

# Of a function that serves all kinds of layers: one graph for each kind and length of a batch.
MAX_GRAPHS = 128

Forward = Callable[..., Any]


class LayerCompiler:
    """Backend of ``torch.compile``: inductor, counted; where it fails, a warning once and the graph uncompiled.

    Attributes:
        num_graphs: Number of graphs compiled so far; it stays the same when no shape is new.
        is_working: False once inductor failed.
    """

    def __init__(self) -> None:
        self.num_graphs = 0
        self.is_working = True

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Forward:
        """Compile a graph, as ``torch.compile`` asks its backend to do."""
        from torch._dynamo import lookup_backend

        if self.is_working:
            try:
                compiled: Forward = lookup_backend("inductor")(graph, inputs)
                self.num_graphs += 1
                return compiled
            except Exception as error:  # of any kind: no compiler, no Triton, a GPU that is too old
                self._warn(error)
        return graph.forward

    def wrap(self, forward: Forward) -> Forward:
        """Return a layer's forward, compiled when it first runs."""
        try:
            compiled: Forward = torch.compile(forward, backend=self, dynamic=False)
            return compiled
        except RuntimeError as error:  # torch.compile does not support this Python or platform
            self._warn(error)
            return forward

    def _warn(self, error: Exception) -> None:
        if self.is_working:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning(f"Training uncompiled: torch.compile failed with {reason}.")
        self.is_working = False


@contextlib.contextmanager
def prepared_layers(
    model: OpenVLAForActionPrediction, compiler: LayerCompiler | None = None, checkpointing: str | None = None
) -> Iterator[None]:
    """Compile or checkpoint the repeated layers of a model inside this context.

    Args:
        model: Model with its adapters, sharded where it is sharded.
        compiler: Compiles the layers; None runs them as they are.
        checkpointing: What the backward pass computes anew: "full" whole layers, "selective" all but matrix products
            and attention, None nothing.
    """
    from torch._dynamo import config as dynamo

    before = []
    limit = contextlib.nullcontext() if compiler is None else dynamo.patch(cache_size_limit=MAX_GRAPHS)
    try:
        for layer in repeated_layers(model):
            before.append((layer, vars(layer).get("forward")))  # set where another library replaced it
            forward = layer.forward if checkpointing is None else _checkpointed(layer.forward, checkpointing)
            layer.forward = forward if compiler is None else compiler.wrap(forward)
        with limit:
            yield
    finally:
        for layer, previous in before:
            del layer.forward
            if previous is not None:
                layer.forward = previous
        if compiler is not None:
            torch.compiler.reset()  # the graphs of this run count towards the limit of the next one


def repeated_layers(model: OpenVLAForActionPrediction) -> list[nn.Module]:
    """Return the layers of the language model and the blocks of the vision towers."""
    backbone = model.vision_backbone
    towers = [tower for tower in (backbone.featurizer, backbone.fused_featurizer) if tower is not None]
    decoder = cast(PreTrainedModel, model.language_model).get_decoder()
    return [*decoder.layers, *(block for tower in towers for block in tower.blocks)]


def _checkpointed(forward: Forward, kind: str) -> Forward:
    """Return a forward whose activations are computed anew in the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts  # torch 2.4

        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return checkpointed


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep the results of attention and of matrix products, save those of a LoRA matrix B, which are cheap."""
    from torch.utils.checkpoint import CheckpointPolicy

    name = operator.name().partition(".")[0].removeprefix("aten::")
    is_kept = "attention" in name
    if name in ("mm", "addmm"):
        inner, outer = args[-1].shape
        is_kept = 8 * inner > outer
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
