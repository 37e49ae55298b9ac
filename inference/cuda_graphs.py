"""CUDA-graph cache for ``predict_action``.

Launch overhead dominates the latency of a single request: the CPU needs longer to launch an action's thousands of
kernels than the GPU to run them. The first call with a given input shape runs eagerly, the second captures a CUDA
graph, and later calls replay it. A replay is bitwise equal to eager execution; this is verified once after the capture.

Before each replay the cache checks that no parameter, buffer, submodule or hook of the model was replaced; if one was,
all graphs are dropped and the call runs eagerly. In-place weight updates need no new capture. Nothing is captured on a
CPU, nor with ``predict_action(fast=False)``.
"""

from __future__ import annotations

import collections
import itertools
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from ..quantization_openvla import quantization_name

logger = logging.get_logger(__name__)

CAPTURE_ATTEMPTS = 2  # a failure of the moment, such as another thread's allocation, must not cost the graph for good
REMEDY = "Predictions are right, but slower; the next load of the model tries again"
MAX_GRAPHS = 8  # of one model, each for one prompt length and batch size; the least recently used one is dropped
MODULE_DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
# Modules of these packages compute from parameters, buffers and submodules alone; those of others may also read plain
# attributes, such as an adapter's switch.
PLAIN_PACKAGES = ("torch", "transformers", __name__.split(".")[0])
SIMPLE_TYPES = (bool, int, float, str, tuple, list, dict, set, type(None))
Tensors = tuple[torch.Tensor, ...]
First = TypeVar("First")
Second = TypeVar("Second")


@dataclass
class Stages:
    """A computation whose first stage is done and says which of the later ones are needed.

    Attributes:
        outputs: Tensors that every stage writes into.
        later: The later stages, in order.
        num_skipped: Integer tensor without dimensions: how many of the leading ones are not needed.
    """

    outputs: Tensors
    later: Sequence[Callable[[], None]]
    num_skipped: torch.Tensor

    def run_later(self, num_skipped: int) -> Tensors:
        """Run the later stages from one on, and return the outputs."""
        for stage in self.later[num_skipped:]:
            stage()
        return self.outputs


Computation = Callable[..., "Tensors | Stages"]


def finish(result: Tensors | Stages) -> Tensors:
    """Return the outputs of a computation; where it has later stages, wait for the device and run those it needs."""
    return result.run_later(int(result.num_skipped)) if isinstance(result, Stages) else result


class Graph(Protocol):
    """A captured computation."""

    @abstractmethod
    def replay(self, inputs: Sequence[torch.Tensor], every_stage: bool = False) -> Tensors:
        """Return the outputs for inputs of the captured shapes and dtypes; run the stages that are needed, or all."""


class CapturedGraph:
    """A computation on the current CUDA device whose kernels are launched together; one graph for each of its stages.

    Args:
        compute: Takes ``inputs``, returns tensors or stages, and never synchronises with the device.
        inputs: On one device; those of a replay have their shapes and dtypes.
        shared: A graph of the same model, whose memory pool and stream this one uses too.
    """

    graph: torch.cuda.CUDAGraph

    def __init__(
        self, compute: Computation, inputs: Sequence[torch.Tensor], shared: CapturedGraph | None = None
    ) -> None:
        self.device = inputs[0].device
        with torch.cuda.device(self.device):
            self._capture(compute, inputs, shared)

    def _capture(self, compute: Computation, inputs: Sequence[torch.Tensor], shared: CapturedGraph | None) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        # Of this device: torch's default capture stream belongs to whichever device captured first.
        self.stream: torch.cuda.Stream = shared.stream if shared else torch.cuda.Stream()
        self.finished: torch.cuda.Event = shared.finished if shared else torch.cuda.Event()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = compute(*self.inputs)  # libraries allocate their workspaces at the first call on a stream
            if isinstance(result, Stages):
                result.run_later(0)
        current.wait_stream(self.stream)
        pool: Any = shared.graph.pool() if shared else None
        self.graph, result = self._record(lambda: compute(*self.inputs), pool)
        self.stages = result if isinstance(result, Stages) else None  # keeps the tensors that later stages read
        self.outputs = result.outputs if isinstance(result, Stages) else result
        self.later = [self._record(stage, self.graph.pool())[0] for stage in (self.stages.later if self.stages else ())]
        for output in self.outputs:  # so that a replay without kernels is noticed
            output.zero_()

    def _record(self, compute: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Return a graph of a computation in a memory pool, and its result, which only a replay computes."""
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        # The outer context restores the stream where the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            result = compute()
        return graph, result

    def replay(self, inputs: Sequence[torch.Tensor], every_stage: bool = False) -> Tensors:
        """Return the outputs for inputs of the captured shapes and dtypes; run the stages that are needed, or all."""
        with torch.cuda.device(self.device):
            self.finished.wait()  # the previous replay, which may have run on another thread's stream
            for static_input, tensor in zip(self.inputs, inputs):
                static_input.copy_(tensor)
            self.graph.replay()
            if self.stages is not None:
                for graph in self.later[0 if every_stage else int(self.stages.num_skipped) :]:
                    graph.replay()
            outputs = tuple(tensor.clone() for tensor in self.outputs)
            self.finished.record()
        return outputs


def run_graphed(model: nn.Module, compute: Computation, inputs: Sequence[Any], key: Hashable) -> Tensors:
    """Return what ``compute(*inputs)`` does, by replaying CUDA graphs where the model is on one GPU and has them.

    Args:
        model: The model that ``compute`` runs; it holds the cache.
        compute: Takes ``inputs``, returns tensors or stages, and never synchronises with the device.
        inputs: Tensors, the first one on the model's device, or None.
        key: Everything else that the result depends on.
    """
    if not _is_supported(model, inputs):
        return finish(compute(*inputs))
    if model.__dict__.get("_cuda_graphs") is None:
        object.__setattr__(model, "_cuda_graphs", CudaGraphCache(model))
    return model.__dict__["_cuda_graphs"].run(compute, inputs, key)


def drop_graphs(model: nn.Module) -> None:
    """Drop a model's CUDA graphs; the next calls run eagerly and capture again."""
    object.__setattr__(model, "_cuda_graphs", None)


def _is_supported(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """Return whether calls of a model can be captured at all."""
    return (
        all(tensor is None or torch.is_tensor(tensor) for tensor in inputs)
        and inputs[0].device.type == "cuda"
        and len(set((getattr(model, "hf_device_map", None) or {}).values())) <= 1
        and not getattr(model, "is_loaded_in_8bit", False)  # LLM.int8 looks for outliers on the host
        and quantization_name(model) != "torchao int8"  # it reads inputs on the host, pytorch/ao#4872
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled()  # its copies of weights are freed when it ends
        and not is_capturing(inputs[0].device)
    )


def is_capturing(device: torch.device) -> bool:
    """Return whether this thread is capturing what is computed on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def run_on_two_streams(
    first: Callable[[], First], second: Callable[[], Second], device: torch.device
) -> tuple[First, Second]:
    """Return the results of two independent computations; a captured graph runs them concurrently, on two streams.

    Args:
        first: Computes on the device.
        second: Computes on the device.
        device: The current device.
    """
    if not is_capturing(device):
        return first(), second()
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        second_result = second()
    first_result = first()
    current.wait_stream(side)
    return first_result, second_result


class ModelSnapshot:
    """The parts of a model that its graphs were captured from, referenced so that their memory is not reused."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.dicts = [module.__dict__[name] for module in modules for name in MODULE_DICTS]
        self.dicts += [state.__dict__ for parameter in model.parameters() for state in _quantization_states(parameter)]
        self.parts = list(_values(self.dicts))
        self.identities = list(map(id, self.parts))
        # A wrapper has no memory of its own; the tensors inside are among the parts.
        self.tensors = [part for part in self.parts if torch.is_tensor(part) and not _is_wrapper(part)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        foreign = [module for module in modules if type(module).__module__.split(".")[0] not in PLAIN_PACKAGES]
        self.settings = [(module, _settings(module)) for module in foreign]

    def is_current(self) -> bool:
        """Return whether the model still consists of exactly these parts."""
        return (
            list(map(id, _values(self.dicts))) == self.identities
            and [tensor.data_ptr() for tensor in self.tensors] == self.addresses
            and all(_settings(module) == settings for module, settings in self.settings)
        )


def _quantization_states(parameter: nn.Parameter) -> list[Any]:
    """Return what holds the tensors of a quantised weight: torchao's weight itself; bitsandbytes' state of 4 bits, and
    that of the scales' own scales.
    """
    state = getattr(parameter, "quant_state", None)
    wrapper = parameter if _is_wrapper(parameter) else None
    return [part for part in (state, getattr(state, "state2", None), wrapper) if part is not None]


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is made of others, which are its attributes, as torchao's weights are."""
    return hasattr(tensor, "__tensor_flatten__")


def _uses_cudnn_attention() -> bool:
    enabled = getattr(torch.backends.cuda, "cudnn_sdp_enabled", None)
    return bool(enabled and enabled())


def _values(dicts: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _settings(module: nn.Module) -> dict[str, str]:
    """Return the plain attributes of a module, which may change what it computes."""
    return {
        name: repr(value)
        for name, value in module.__dict__.items()
        if isinstance(value, SIMPLE_TYPES) and name not in MODULE_DICTS
    }


class CudaGraphCache:
    """The captured graphs of one model.

    Args:
        model: The model.
        capture: Captures a computation with its inputs, sharing memory with another graph.
    """

    def __init__(self, model: nn.Module, capture: Callable[..., Graph] = CapturedGraph) -> None:
        self.model, self.capture = model, capture
        # By key: None after the first call, False where capturing failed.
        self.graphs: collections.OrderedDict[Hashable, Graph | bool | None] = collections.OrderedDict()
        self.snapshot: ModelSnapshot | None = None
        self.lock = threading.Lock()

    def run(self, compute: Computation, inputs: Sequence[Any], key: Hashable) -> Tensors:
        """Return what ``compute(*inputs)`` does, by a replay where it was captured; arguments as of ``run_graphed``."""
        if not self.lock.acquire(blocking=False):  # another thread uses the graphs' memory
            return finish(compute(*inputs))
        present = [index for index, tensor in enumerate(inputs) if tensor is not None]

        def compute_present(*tensors: torch.Tensor) -> Tensors | Stages:
            by_index = dict(zip(present, tensors))
            return compute(*(by_index.get(index) for index in range(len(inputs))))

        try:
            tensors = [inputs[index].to(inputs[0].device) for index in present]
            return self._run(compute_present, tensors, (key, *present, _graph_key(tensors)))
        finally:
            self.lock.release()

    def _run(self, compute: Computation, inputs: Sequence[torch.Tensor], key: Hashable) -> Tensors:
        if self.snapshot is not None and not self.snapshot.is_current():
            logger.warning_once("The model was changed; its CUDA graphs are captured again.")
            self.graphs.clear()
            self.snapshot = None
        if key not in self.graphs:
            self.graphs[key] = None  # captured at the next call
            while len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
            return finish(compute(*inputs))
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        if graph is None:
            result = compute(*inputs)
            outputs = expected = finish(result)
            if isinstance(result, Stages):  # a graph is verified in every stage, which writes into the outputs again
                outputs = tuple(tensor.clone() for tensor in outputs)
                expected = result.run_later(0)
            self.graphs[key] = self._captured(compute, inputs, expected)
            return outputs
        return finish(compute(*inputs)) if isinstance(graph, bool) else graph.replay(inputs)

    def _captured(self, compute: Computation, inputs: Sequence[torch.Tensor], expected: Tensors) -> Graph | bool:
        """Return a graph whose replay, with every stage, gives the expected outputs, or False where there is none."""
        if self.snapshot is None:
            self.snapshot = ModelSnapshot(self.model)
        if {tensor.device for tensor in self.snapshot.tensors} != {inputs[0].device}:
            return self._failed("the model is spread over devices")
        reason = ""
        for _ in range(CAPTURE_ATTEMPTS):
            try:
                graph = self.capture(compute, inputs, next(filter(None, self.graphs.values()), None))
                replayed = graph.replay(inputs, every_stage=True)
            except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if all(map(torch.equal, replayed, expected)):
                return graph
            reason = "its replay gives other numbers than the model"
            if _uses_cudnn_attention():
                reason += ", as cuDNN's attention may: torch.backends.cuda.enable_cudnn_sdp(False)"
        return self._failed(reason)

    @staticmethod
    def _failed(reason: str) -> bool:
        logger.warning_once(f"Running without a CUDA graph: {reason.rstrip('.')}. {REMEDY}.")
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied model captures its own graphs."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _graph_key(inputs: Sequence[torch.Tensor]) -> Hashable:
    """Return what a graph depends on apart from the model: shapes, dtypes, devices and torch's settings."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # from torch 2.9 on reading the old names raises where the new ones were set
        float32 = matmul.fp32_precision, cudnn.conv.fp32_precision
    else:
        float32 = matmul.allow_tf32, cudnn.allow_tf32
    return (
        tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs),
        torch.is_inference_mode_enabled(),
        (*float32, matmul.allow_bf16_reduced_precision_reduction),
        torch.are_deterministic_algorithms_enabled(),
    )
