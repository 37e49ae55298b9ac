"""Adapter methods that models inherit from transformers, for the adapters of this package too.

``loading.attach_methods`` sets ``METHODS`` on the model class, in place of the inherited ones.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedModel

from ..compatibility_openvla import release
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from .lora import ADAPTER_NAME, NO_ADAPTER, import_peft

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction


def disable_adapters(model: OpenVLAForActionPrediction) -> None:
    """Predict as the base does, heads included, until ``enable_adapters``.

    Raises:
        ValueError: There is no adapter.
        ImportError: This is the code of a saved folder, and the openvla package is not installed.
    """
    _switch_adapters(model, enabled=False)


def enable_adapters(model: OpenVLAForActionPrediction) -> None:
    """Predict with the adapter again, modules that were trained in full included.

    transformers' own method (seen up to 5.24) leaves those switched off.

    Raises:
        ValueError: There is no adapter.
        ImportError: This is the code of a saved folder, and the openvla package is not installed.
    """
    _switch_adapters(model, enabled=True)


def _switch_adapters(model: OpenVLAForActionPrediction, enabled: bool) -> None:
    """Switch all adapters on or off, with the modules that were trained in full."""
    if not model._hf_peft_config_loaded:
        raise OpenVLAValueError(NO_ADAPTER)
    layer_types = (import_peft("tuners.tuners_utils").BaseTunerLayer, import_peft("utils").ModulesToSaveWrapper)
    for module in model.modules():
        if isinstance(module, layer_types):
            module.enable_adapters(enabled)


def active_adapters(model: OpenVLAForActionPrediction) -> list[str]:
    """Return the names of the adapters in use: of this package, or of transformers' ``add_adapter``.

    Raises:
        ValueError: There is no adapter.
    """
    if not model._hf_peft_config_loaded:
        raise OpenVLAValueError(NO_ADAPTER)
    return [ADAPTER_NAME] if model.lora_adapter is not None else PreTrainedModel.active_adapters(model)


# transformers' methods that need a particular version of peft, and this package's methods that do not.
REPLACEMENTS = {
    "add_adapter": "enable_lora",
    "load_adapter": "load_lora",
    "set_adapter": "load_lora",
    "delete_adapter": "merge_lora",
    "get_adapter_state_dict": "save_lora",
}


def require_peft_of_transformers(method: str, replacement: str) -> None:
    """Check that peft is new enough for transformers' own adapter methods; this package's methods need peft 0.11.1.

    Args:
        method: The method of transformers that was called.
        replacement: This package's method, which the message recommends.

    Raises:
        ImportError: peft is missing or older than this transformers asks for (5.24.0: peft 0.22).
    """
    needed = importlib.import_module("transformers.integrations.peft").MIN_PEFT_VERSION
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed == "none" or release(installed) < release(needed):
        raise OpenVLAImportError(
            f"{method}() is transformers' own: transformers {transformers.__version__} needs peft {needed} or newer "
            f"for it; installed: {installed}. Use {replacement}() of this model, which runs with peft 0.11.1 and newer."
        )


def _checked(name: str) -> Callable[..., Any]:
    """Return a method of transformers that first checks the version of peft."""
    method = getattr(PreTrainedModel, name)

    @functools.wraps(method)
    def checked(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        require_peft_of_transformers(name, REPLACEMENTS[name])
        return method(model, *args, **kwargs)

    return checked


METHODS: tuple[Callable[..., Any], ...] = (
    disable_adapters,
    enable_adapters,
    active_adapters,
    *(_checked(name) for name in REPLACEMENTS if hasattr(PreTrainedModel, name)),  # 4.40 has no delete_adapter
)
