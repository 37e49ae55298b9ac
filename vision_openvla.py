"""Vision towers (ViTs under timm's parameter names) and the projector into the language model's embedding space.

The towers return the patch features of their *second-to-last* block. The last block, the final norm and the pooling
head are never run; they exist because their weights are part of every published checkpoint.

timm's ``vision_transformer.py`` is the reference: results have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_openvla import PrismaticConfig
from .errors_openvla import OpenVLAValueError


@dataclass(frozen=True)
class TowerArchitecture:
    """Architecture that ``timm.create_model`` builds for an id; the fields are timm's arguments."""

    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False  # position embeddings for patches only; prefix tokens are prepended afterwards
    pre_norm: bool = False  # CLIP: norm before the blocks, patch embedding without bias
    layer_scale: bool = False
    attention_pool: bool = False  # SigLIP's pooling head
    norm_eps: float = 1e-6


_DINOV2 = TowerArchitecture(reg_tokens=4, no_embed_class=True, layer_scale=True)
_SIGLIP = TowerArchitecture(
    embed_dim=1152, depth=27, mlp_ratio=3.7362, class_token=False, no_embed_class=True, attention_pool=True
)
_CLIP = TowerArchitecture(pre_norm=True, norm_eps=1e-5)

ARCHITECTURES: dict[str, TowerArchitecture] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": _DINOV2,
    "vit_so400m_patch14_siglip_224": _SIGLIP,
    "vit_so400m_patch14_siglip_384": _SIGLIP,
    "vit_large_patch14_clip_224.openai": _CLIP,
    "vit_large_patch14_clip_336.openai": _CLIP,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": TowerArchitecture(patch_size=16),
}


class QuickGELU(nn.Module):
    """OpenAI CLIP's approximation of GELU, ``x * sigmoid(1.702 x)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {None: nn.GELU, "gelu": nn.GELU, "quick_gelu": QuickGELU}


class LayerScale(nn.Module):
    """Learned scale per channel. Named ``scale_factor`` as published: old loaders rename any ``gamma``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, dim: int, hidden_dim: int, activation: str | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, arch: TowerArchitecture, activation: str | None) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=arch.norm_eps)
        self.attn = Attention(dim, arch.num_heads)
        self.ls1 = LayerScale(dim) if arch.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=arch.norm_eps)
        self.mlp = Mlp(dim, int(dim * arch.mlp_ratio), activation)
        self.ls2 = LayerScale(dim) if arch.layer_scale else nn.Identity()

    def add_film(self, film_dim: int) -> None:
        """Add FiLM (Perez et al. 2018) between attention and MLP, with zero weights: at first it changes nothing.

        Args:
            film_dim: Size of the language feature.
        """
        dim = self.norm1.normalized_shape[0]
        self.scale, self.shift = nn.Linear(film_dim, dim), nn.Linear(film_dim, dim)
        for parameter in (*self.scale.parameters(), *self.shift.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if condition is not None:
            num_images = len(x) // len(condition)  # images of one sample share its condition
            scale, shift = (
                layer(condition).repeat_interleave(num_images, dim=0)[:, None] for layer in (self.scale, self.shift)
            )
            x = x * (1 + scale) + shift
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Embedding of non-overlapping patches by one convolution."""

    def __init__(self, arch: TowerArchitecture) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, arch.embed_dim, arch.patch_size, stride=arch.patch_size, bias=not arch.pre_norm)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """SigLIP's pooling head; never run, its weights are part of the checkpoints."""

    def __init__(self, arch: TowerArchitecture, activation: str | None) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=arch.norm_eps)
        self.mlp = Mlp(dim, int(dim * arch.mlp_ratio), activation)


class VisionTower(nn.Module):
    """A ViT that returns the patch features of its second-to-last block.

    Args:
        timm_id: A key of ``ARCHITECTURES``, or any name when ``overrides`` has every field.
        image_size: Input height and width in pixels.
        activation: None (GELU) or "quick_gelu".
        overrides: Fields of ``TowerArchitecture`` that differ from the id's (depth, embed_dim, ...).
    """

    def __init__(
        self,
        timm_id: str,
        image_size: int,
        activation: str | None,
        overrides: dict[str, Any],
    ) -> None:
        super().__init__()
        arch = _architecture(timm_id, image_size, activation, overrides)
        self.image_size = image_size
        self.embed_dim = arch.embed_dim
        self.no_embed_class = arch.no_embed_class
        self.num_patches = (image_size // arch.patch_size) ** 2
        self.num_prefix_tokens = int(arch.class_token) + arch.reg_tokens
        positions = self.num_patches + (0 if arch.no_embed_class else self.num_prefix_tokens)

        self.patch_embed = PatchEmbed(arch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.embed_dim)) if arch.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, arch.reg_tokens, arch.embed_dim)) if arch.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.randn(1, positions, arch.embed_dim) * 0.02)
        self.norm_pre = nn.LayerNorm(arch.embed_dim, eps=arch.norm_eps) if arch.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(arch, activation) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.embed_dim, eps=arch.norm_eps)
        self.gradient_checkpointing = False  # set by transformers' gradient_checkpointing_enable
        if arch.attention_pool:
            self.attn_pool = AttentionPool(arch, activation)

    def forward(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return patch features ``(batch, num_patches, embed_dim)`` of normalised images ``(batch, 3, size, size)``.

        ``condition`` is FiLM's language feature ``(samples, film_dim)``; ``batch`` is a multiple of ``samples``.
        """
        x = self._with_position(self.patch_embed(pixel_values))
        x = self.norm_pre(x)
        for block in self.blocks[:-1]:
            if self.gradient_checkpointing and self.training:
                # With use_reentrant=True a block's adapters would silently get no gradient, as its input needs none.
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        return x[:, self.num_prefix_tokens :]

    def _with_position(self, patches: torch.Tensor) -> torch.Tensor:
        prefix = [token.expand(len(patches), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.no_embed_class:
            return torch.cat([*prefix, patches + self.pos_embed], dim=1)
        return torch.cat([*prefix, patches], dim=1) + self.pos_embed


class PrismaticVisionBackbone(nn.Module):
    """One tower (``featurizer``), or two whose features are concatenated channel by channel (``fused_featurizer``)."""

    # Set by the installed package (inference/cuda_graphs.py).
    run_on_two_streams: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]] | None] = None

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        towers = [
            VisionTower(timm_id, image_size, activation, overrides)
            for timm_id, image_size, activation, overrides in zip(
                config.timm_model_ids,
                config.image_sizes,
                config.timm_override_act_layers,
                config.timm_model_kwargs,
            )
        ]
        self.featurizer = towers[0]
        self.fused_featurizer = towers[1] if len(towers) == 2 else None
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        self.sep_tok = nn.Embedding(1, self.embed_dim) if config.trace_prompting else None  # TraceVLA's separator
        self.configure(config)
        if len({tower.num_patches for tower in towers}) > 1:
            raise OpenVLAValueError(
                "Both vision towers must give the same number of patches, got "
                f"{[tower.num_patches for tower in towers]} from {config.timm_model_ids}."
            )

    def configure(self, config: PrismaticConfig) -> None:
        """Set the number of images, and add FiLM where the configuration has it."""
        self.num_images, self.film = config.num_images_in_input, config.film_dim is not None
        for block in list(self.modules()):
            if isinstance(block, VisionBlock) and config.film_dim is not None:
                block.add_film(config.film_dim)

    @property
    def patches_per_prompt(self) -> int:
        """Return the number of patches of all images of a prompt, with TraceVLA's separators between images."""
        separators = 0 if self.sep_tok is None else self.num_images - 1
        return self.num_images * self.featurizer.num_patches + separators

    @property
    def num_channels(self) -> int:
        """Return the number of channels of one image in ``pixel_values``: three a tower."""
        return 3 if self.fused_featurizer is None else 6

    def forward(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return patch features ``(batch, patches_per_prompt, embed_dim)``, one image after the other.

        Args:
            pixel_values: Normalised images ``(batch, images * (3 or 6), height, width)``; with two towers an image's
                channels 0-2 are normalised for the first and 3-5 for the second.
            condition: With FiLM, the language feature ``(batch, film_dim)``.
        """
        size, images = self.featurizer.image_size, self.num_images
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (images * self.num_channels, size, size):
            cameras = f" ({images} images of {self.num_channels} channels each)" if images > 1 else ""
            raise OpenVLAValueError(
                f"pixel_values must have shape (batch, {images * self.num_channels}, {size}, {size}){cameras}, "
                f"got {tuple(pixel_values.shape)}; make them with the checkpoint's own processor."
            )
        if self.film and condition is None:
            raise OpenVLAValueError(
                "The vision towers have FiLM and need the instruction's embedding; use predict_action."
            )
        if images > 1:
            pixel_values = pixel_values.unflatten(1, (images, self.num_channels)).flatten(0, 1)
        first, second = self.featurizer, self.fused_featurizer
        if second is None:
            features = first(pixel_values, condition)
        else:
            run = (lambda: first(pixel_values[:, :3], condition), lambda: second(pixel_values[:, 3:], condition))
            if self.run_on_two_streams is None:
                both = run[0](), run[1]()
            else:
                both = self.run_on_two_streams(*run, pixel_values.device)
            features = torch.cat(both, dim=2)
        if self.sep_tok is not None:  # behind every image but the last, before the projector
            separator = self.sep_tok(torch.zeros(len(features), 1, dtype=torch.long, device=features.device))
            features = torch.cat([features, separator.to(features)], dim=1)
        features = features.unflatten(0, (-1, images)).flatten(1, 2) if images > 1 else features
        return features if self.sep_tok is None else features[:, :-1]


class PrismaticProjector(nn.Module):
    """MLP from vision features ``(..., vision_dim)`` to the language model's embeddings ``(..., llm_dim)``."""

    def __init__(self, fused: bool, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        hidden_dim = 4 * vision_dim if fused else llm_dim
        self.fc1 = nn.Linear(vision_dim, hidden_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, llm_dim)
        if fused:
            self.act_fn2 = nn.GELU()
            self.fc3 = nn.Linear(llm_dim, llm_dim)
        self.fused = fused

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.fc2(self.act_fn1(self.fc1(features)))
        return self.fc3(self.act_fn2(hidden)) if self.fused else hidden


def _architecture(
    timm_id: str, image_size: int, activation: str | None, overrides: dict[str, Any]
) -> TowerArchitecture:
    """Return the checked architecture of a tower, with its overrides (``img_size`` is already in ``image_size``)."""
    overrides = {name: value for name, value in overrides.items() if name != "img_size"}
    known = {field.name for field in fields(TowerArchitecture)}
    if timm_id not in ARCHITECTURES and not known <= set(overrides):
        raise OpenVLAValueError(
            f"Unknown timm_model_ids entry {timm_id!r}. Allowed: {sorted(ARCHITECTURES)}, or any other whose "
            f"timm_model_kwargs give all of {sorted(known)}."
        )
    if activation not in ACTIVATIONS:
        raise OpenVLAValueError(f"Unknown activation {activation!r}. Allowed: {list(ACTIVATIONS)}.")
    if not set(overrides) <= known:
        raise OpenVLAValueError(
            f"Unknown timm_model_kwargs {sorted(set(overrides) - known)} for {timm_id}. "
            f"Allowed: {sorted(known | {'img_size'})}."
        )
    arch = replace(ARCHITECTURES.get(timm_id, TowerArchitecture()), **overrides)
    if arch.embed_dim % arch.num_heads:
        raise OpenVLAValueError(
            f"{timm_id}: embed_dim {arch.embed_dim} is not a multiple of num_heads {arch.num_heads}."
        )
    if arch.depth < 2:
        raise OpenVLAValueError(
            f"{timm_id}: depth must be at least 2 to have a second-to-last block, got {arch.depth}."
        )
    if image_size < arch.patch_size:
        raise OpenVLAValueError(
            f"{timm_id}: image size {image_size} is smaller than one patch of {arch.patch_size} pixels."
        )
    return arch
