"""An answer as one CUDA graph: its thousands of kernels are recorded once, then launched as one.

The host needs longer to launch an action's kernels than the GPU to run them. So the second answer of a shape is
recorded while it is made, and from the third on the recording is replayed; the first is made plainly, and waits for
nothing. A recording is the same kernels on the same weights, so its answers are the plain ones bit for bit, which is
checked when it is made. What it was made of is checked before every replay: whatever was exchanged, moved, wrapped or
switched since makes all recordings void, and the answer is made plainly; weights changed in place are read anew.

Nothing is recorded on a CPU. ``predict_action(fast=False)`` goes no part of this way.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .quantization_openvla import is_quantized

logger = logging.get_logger(__name__)

KEPT = 8  # recordings of a model, each of one prompt length and batch size; the least recently used goes
PARTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")  # of a module
Tensors = tuple[torch.Tensor, ...]
# Modules of these packages keep what they compute in parameters, buffers and other modules; others in attributes too.
PLAIN_PACKAGES = ("torch", "transformers", "transformers_modules", __name__.split(".")[0])


class CudaRecording:
    """A computation on the current CUDA device whose kernels are launched together.

    Args:
        compute: Takes ``inputs``, gives tensors, and never waits for the device.
        inputs: On the device, the first one's; those of a replay have their shapes and dtypes.
        beside: Another, with which it shares what memory its own steps need.
    """

    def __init__(
        self, compute: Callable[..., Tensors], inputs: Sequence[torch.Tensor], beside: CudaRecording | None = None
    ) -> None:
        self.device = inputs[0].device
        with torch.cuda.device(self.device):
            self._record(compute, inputs, beside)

    def _record(
        self, compute: Callable[..., Tensors], inputs: Sequence[torch.Tensor], beside: CudaRecording | None
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        here = torch.cuda.current_stream()
        # Of this device: the stream that torch would take is of whichever device recorded first.
        self.stream = beside.stream if beside else torch.cuda.Stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            compute(*self.inputs)  # libraries take their workspaces at the first call on a stream
        here.wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        self.done = beside.done if beside else torch.cuda.Event()
        pool = beside.graph.pool() if beside else None
        recording = torch.cuda.graph(self.graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(here), recording:  # torch does not come back to it where the recording fails
            self.outputs = compute(*self.inputs)
        for output in self.outputs:  # so that a replay which computes nothing does not pass for one that does
            output.zero_()

    def replay(self, inputs: Sequence[torch.Tensor]) -> Tensors:
        """What the computation gives for these inputs."""
        with torch.cuda.device(self.device):
            self.done.wait()  # the last replay, which may have run on another thread's stream
            for place, tensor in zip(self.inputs, inputs):
                place.copy_(tensor)
            self.graph.replay()
            outputs = tuple(tensor.clone() for tensor in self.outputs)
            self.done.record()
        return outputs


def recorded(model: nn.Module, compute: Callable[..., Tensors], inputs: Sequence[Any], key: Hashable) -> Tensors:
    """What ``compute`` makes of ``inputs``, from a recording where the model is on one GPU and has one.

    Args:
        model: Whose answer it is.
        compute: Takes ``inputs``, gives tensors, and never waits for the device.
        inputs: Tensors, the first on the model's device, or None.
        key: What else the answer depends on.
    """
    if not _records(model, inputs):
        return compute(*inputs)
    if model.__dict__.get("_recordings") is None:
        model._recordings = Recordings(model)
    return model._recordings.answer(compute, inputs, key)


def _records(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether answers of a model are recorded at all."""
    return (
        all(tensor is None or torch.is_tensor(tensor) for tensor in inputs)
        and inputs[0].device.type == "cuda"
        and len(set((getattr(model, "hf_device_map", None) or {}).values())) <= 1
        and not is_quantized(model)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled()  # its copies of weights do not outlive it
        and not is_recording(inputs[0].device)
    )


def is_recording(device: torch.device) -> bool:
    """Whether what is computed on a device now is being recorded, by this thread."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def beside(first: Callable[[], Any], second: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """What two independent computations give; a recording launches their kernels beside each other, on two streams.

    Args:
        first: Computes on the device.
        second: Computes there too.
        device: The current one.
    """
    if not is_recording(device):
        return first(), second()
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        other = second()
    one = first()
    here.wait_stream(aside)
    return one, other


class Ingredients:
    """What a recording of a model was made of, held so that its memory is not given to anything else."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.dicts = [module.__dict__[name] for module in modules for name in PARTS]
        self.parts = list(_values(self.dicts))
        self.identities = list(map(id, self.parts))
        self.tensors = [part for part in self.parts if torch.is_tensor(part)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        foreign = [module for module in modules if type(module).__module__.split(".")[0] not in PLAIN_PACKAGES]
        self.settings = [(module, _settings(module)) for module in foreign]

    def are_unchanged(self) -> bool:
        """Whether the model still consists of them, and of nothing else."""
        return (
            list(map(id, _values(self.dicts))) == self.identities
            and [tensor.data_ptr() for tensor in self.tensors] == self.addresses
            and all(_settings(module) == then for module, then in self.settings)
        )


def _values(dicts: Sequence[dict]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _settings(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that may steer what it computes, such as an adapter's switch."""
    simple = (bool, int, float, str, tuple, list, dict, set, type(None))
    kept = {name: value for name, value in module.__dict__.items() if isinstance(value, simple)}
    return {name: repr(value) for name, value in kept.items() if name not in PARTS}


class Recordings:
    """The recorded answers of one model.

    Args:
        model: Whose answers.
        record: Makes a recording of a computation and its inputs, beside another.
    """

    def __init__(self, model: nn.Module, record: Callable[..., Any] = CudaRecording) -> None:
        self.model, self.record = model, record
        self.made: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self.ingredients: Ingredients | None = None
        self.lock = threading.Lock()

    def answer(self, compute: Callable[..., Tensors], inputs: Sequence[Any], key: Hashable) -> Tensors:
        """What ``compute`` makes of ``inputs``, replayed where it was recorded; arguments as of ``recorded``."""
        if not self.lock.acquire(blocking=False):  # another thread has the recordings' memory in hand
            return compute(*inputs)
        places = [index for index, tensor in enumerate(inputs) if tensor is not None]

        def of_given(*tensors: torch.Tensor) -> Tensors:
            given = dict(zip(places, tensors))
            return compute(*(given.get(index) for index in range(len(inputs))))

        try:
            given = [inputs[index].to(inputs[0].device) for index in places]
            return self._answer(of_given, given, (key, *places, _circumstances(given)))
        finally:
            self.lock.release()

    def _answer(self, compute: Callable[..., Tensors], inputs: Sequence[torch.Tensor], key: Hashable) -> Tensors:
        if self.ingredients is not None and not self.ingredients.are_unchanged():
            logger.warning_once("The model was changed; its answers are recorded anew. (Said once.)")
            self.made.clear()
            self.ingredients = None
        if key not in self.made:
            self._keep(key, None)  # next time
            return compute(*inputs)
        self.made.move_to_end(key)
        recording = self.made[key]
        if recording is None:
            outputs = compute(*inputs)
            self.made[key] = self._recorded(compute, inputs, outputs)
            return outputs
        return compute(*inputs) if recording is False else recording.replay(inputs)

    def _keep(self, key: Hashable, recording: Any) -> None:
        self.made[key] = recording
        while len(self.made) > KEPT:
            self.made.popitem(last=False)

    def _recorded(self, compute: Callable[..., Tensors], inputs: Sequence[torch.Tensor], expected: Tensors) -> Any:
        """The recording, or False where there is none to be had; one that answers otherwise is not kept."""
        if self.ingredients is None:
            self.ingredients = Ingredients(self.model)
        if {tensor.device for tensor in self.ingredients.tensors} != {inputs[0].device}:
            return self._not_recorded("the model is spread over devices")
        try:
            recording = self.record(compute, inputs, next(filter(None, self.made.values()), None))
            replayed = recording.replay(inputs)
        except (RuntimeError, ValueError) as error:  # of memory too
            return self._not_recorded(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if all(map(torch.equal, replayed, expected)):
            return recording
        return self._not_recorded("the recording answers otherwise")

    @staticmethod
    def _not_recorded(reason: str) -> bool:
        logger.warning_once(f"The same actions, but not as one CUDA graph: {reason}. (Said once.)")
        return False

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model records its own."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _circumstances(inputs: Sequence[torch.Tensor]) -> Hashable:
    """What a recording depends on beside the model."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # from torch 2.9 on asking for the old names raises where the new ones were set
        float32 = matmul.fp32_precision, cudnn.conv.fp32_precision
    else:
        float32 = matmul.allow_tf32, cudnn.allow_tf32
    return (
        tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs),
        torch.is_inference_mode_enabled(),
        (*float32, matmul.allow_bf16_reduced_precision_reduction),
        torch.are_deterministic_algorithms_enabled(),
    )
