"""MiniVLA's vector-quantised (VQ) actions: a few tokens are codes of a whole chunk of actions.

A residual VQ autoencoder encodes a chunk ``(chunk_length, action_dim)`` to a latent vector, and quantises it in rounds:
each round has its own codebook and takes the entry that is nearest to what the rounds before it left over. The codes,
coarse to fine, are the model's action tokens. The sum of their entries decodes to the chunk.

Lee et al. 2024, "Behavior Generation with Latent Actions" (VQ-BeT).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .actions_openvla import as_numbers
from .configuration_openvla import OpenVLAConfig, optional_file
from .errors_openvla import OpenVLATypeError, OpenVLAValueError

VQ_MODULE = "action_vq"  # its name in the model; its tensors are float32 whatever the model's dtype


class ActionVQ(nn.Module):
    """Weights of the residual VQ autoencoder: float32 buffers, which no cast of the model and no optimizer changes.

    ``code_sums`` and ``code_counts`` are moving averages of the autoencoder's own training.
    """

    codebooks: torch.Tensor  # (rounds, codes, latent)

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        fields = config.action_vq or {}
        self.shape, self.act_scale = (config.chunk_length, config.action_dim or 0), float(fields["act_scale"])
        latent, hidden, size = fields["latent_dim"], fields["hidden_dim"], self.shape[0] * self.shape[1]
        codes = (fields["num_rounds"], fields["num_codes"])
        shapes: dict[str, tuple[int, ...]] = {"codebooks": (*codes, latent), "code_sums": (*codes, latent)}
        shapes["code_counts"] = codes
        encoder = (size, hidden, hidden, latent)
        for part, sizes in (("encoder", encoder), ("decoder", encoder[::-1])):
            for layer in range(3):
                shapes[f"{part}_weight_{layer}"] = (sizes[layer + 1], sizes[layer])
                shapes[f"{part}_bias_{layer}"] = (sizes[layer + 1],)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the weights as the model's, but keep them float32 (torch's ``to``, ``half``, ``cuda`` call this)."""

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(without_cast, recurse)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes, int64 ``(batch, rounds)``, to normalised chunks ``(batch, chunk_length, action_dim)``."""
        rounds = torch.arange(len(self.codebooks), device=self.codebooks.device)
        latent = self.codebooks[rounds, codes.to(rounds.device)].sum(1)
        return self._layers("decoder", latent).unflatten(-1, self.shape) * self.act_scale

    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        """Return the codes of normalised chunks, float32 ``(batch, chunk_length, action_dim)``."""
        left = self._layers("encoder", chunks.to(self.codebooks.device).flatten(1) / self.act_scale)
        codes = []
        for codebook in self.codebooks:
            codes.append(torch.cdist(left, codebook).argmin(-1))
            left = left - codebook[codes[-1]]
        return torch.stack(codes, dim=-1)

    def _layers(self, part: str, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            for layer in range(3):
                # Aligned copies: the last bits of a product may depend on the address that a file gives a weight.
                weights = (getattr(self, f"{part}_{kind}_{layer}").clone() for kind in ("weight", "bias"))
                x = F.linear(x if layer == 0 else F.relu(x), *weights)
        return x


class VQActionTokenizer:
    """Tokenizer of action chunks; token ``vocab_size - 1 - code`` stands for a code.

    (A bin's token is ``vocab_size - digitize(action)``, with bins from 1 on: one off from this rule.)

    Args:
        vocab_size: Size of the *unpadded* vocabulary, whose last ``n_bins`` ids are the codes.
        vq: The autoencoder.
    """

    def __init__(self, vocab_size: int, vq: ActionVQ) -> None:
        self.vocab_size, self.vq = int(vocab_size), vq
        self.num_rounds, self.n_bins = vq.codebooks.shape[:2]

    @property
    def first_token_id(self) -> int:
        """Return the lowest id that is a code; the highest is ``vocab_size - 1``."""
        return self.vocab_size - self.n_bins

    def codes(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the codes of token ids, int64 of the same shape; other tokens' are clipped, as in the reference."""
        token_ids = np.asarray(token_ids)
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise OpenVLATypeError(f"Token ids must be integers, got dtype {token_ids.dtype}.")
        return np.clip(self.vocab_size - 1 - token_ids.astype(np.int64), 0, self.n_bins - 1)

    @torch.no_grad()
    def decode(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the normalised chunks of token ids ``(..., rounds)``: float32 ``(..., chunk_length, action_dim)``.

        They may leave [-1, 1]. ``encode`` is the inverse up to the quantisation.
        """
        codes = self.codes(token_ids)
        if codes.shape[-1:] != (self.num_rounds,):
            raise OpenVLAValueError(f"A chunk has {self.num_rounds} tokens, got shape {codes.shape}.")
        chunks = self.vq(torch.from_numpy(codes.reshape(-1, self.num_rounds)))
        return chunks.reshape(*codes.shape[:-1], *self.vq.shape).cpu().numpy()

    @torch.no_grad()
    def encode(self, actions: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Return the token ids, int64 ``(..., rounds)``, of normalised chunks ``(..., chunk_length, action_dim)``."""
        chunks = as_numbers(actions, "A chunk")
        if chunks.shape[-2:] != self.vq.shape or not np.isfinite(chunks).all():
            raise OpenVLAValueError(f"A chunk must hold {self.vq.shape} finite numbers, got shape {chunks.shape}.")
        codes = self.vq.encode(torch.from_numpy(chunks.reshape(-1, *self.vq.shape)).float())
        return self.vocab_size - 1 - codes.cpu().numpy().reshape(*chunks.shape[:-2], self.num_rounds)


def restore_float32(vq: ActionVQ, name_or_path: str | os.PathLike[str], hub: dict[str, Any]) -> None:
    """Read the autoencoder's weights again, which transformers casts to the model's dtype when it loads them."""
    index = optional_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, hub)
    weight_map = {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    keys = {f"{VQ_MODULE}.{name}": name for name, _ in vq.named_buffers()}
    for file in sorted({weight_map.get(key, SAFE_WEIGHTS_NAME) for key in keys}):
        path = optional_file(name_or_path, file, hub)
        if path is None:
            raise OpenVLAValueError(
                f"{name_or_path} holds no {file}, from which the VQ autoencoder's float32 weights are read; load it "
                "with dtype=torch.float32, save it as safetensors, and load that."
            )
        with safe_open(path, framework="pt") as tensors:
            for key in keys.keys() & tensors.keys():
                device = vq.get_buffer(keys[key]).device
                vq.register_buffer(keys[key], tensors.get_tensor(key).to(device=device, dtype=torch.float32))
