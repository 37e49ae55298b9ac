"""The towers: features, dead weights, and equality with timm in every bit."""

import numpy as np
import pytest
import torch
from openvla import OpenVLAConfig, PrismaticConfig
from openvla.configuration_openvla import VISION_BACKBONES
from openvla.vision_openvla import ARCHITECTURES, PrismaticVisionBackbone, VisionTower
from reference import FEATURE_ATOL

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.mark.lane
def test_golden_features(golden):
    with torch.no_grad():
        features = golden.model.vision_backbone(golden.pixel_values[:1])
        projected = golden.model.projector(features)
    np.testing.assert_allclose(features, golden.forward["mm0/patch_features"], rtol=0, atol=FEATURE_ATOL)
    np.testing.assert_allclose(projected, golden.forward["mm0/projector_features"], rtol=0, atol=FEATURE_ATOL)


@pytest.mark.lane
def test_tensor_names_and_shapes_are_the_published_ones(golden):
    state = golden.model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: entry["shape"] for name, entry in golden.tensors.items()
    }
    for name in ("vision_backbone.featurizer.", "projector.fc1.", "projector.fc2.", "language_model."):
        assert any(tensor.startswith(name) for tensor in state)  # what vLLM's loader asks for


@pytest.mark.parametrize("backbone", VISION_BACKBONES)
def test_every_backbone_builds_and_runs(backbone):
    towers = VISION_BACKBONES[backbone]
    config = PrismaticConfig(vision_backbone_id=backbone, timm_model_kwargs=[SMALL] * len(towers))
    module = fill(PrismaticVisionBackbone(config))
    size = towers[0][1]
    with torch.no_grad():
        features = module(torch.randn(2, module.num_channels, size, size))
    patch = ARCHITECTURES[towers[0][0]].patch_size
    assert features.shape == (2, (size // patch) ** 2, 48 * len(towers))


def test_the_last_block_has_weights_but_is_not_run():
    tower = fill(VisionTower("vit_so400m_patch14_siglip_224", 224, None, SMALL))
    ran = []
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        tower(torch.randn(1, 3, 224, 224))
    assert ran == [0, 1]
    assert "blocks.2.mlp.fc2.weight" in tower.state_dict()
    assert "attn_pool.latent" in tower.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_huge", 224, None, {}), "Unknown timm_model_ids"),
        (("vit_so400m_patch14_siglip_224", 224, "swish", {}), "activation 'swish'"),
        (("vit_so400m_patch14_siglip_224", 224, None, {"width": 3}), "timm_model_kwargs"),
        (("vit_so400m_patch14_siglip_224", 224, None, {"embed_dim": 50, "num_heads": 3}), "multiple"),
        (("vit_so400m_patch14_siglip_224", 224, None, {"depth": 1}), "at least 2"),
        (("vit_so400m_patch14_siglip_224", 8, None, SMALL), "smaller than one patch"),
    ],
)
def test_impossible_towers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTower(*arguments)


def test_towers_must_agree_on_the_number_of_patches():
    config = PrismaticConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", timm_model_kwargs=[SMALL, {**SMALL, "patch_size": 28}]
    )
    with pytest.raises(ValueError, match="same number of patches"):
        PrismaticVisionBackbone(config)


@pytest.mark.lane
def test_film_modulates_all_images_of_a_sample_by_its_instruction():
    fields = {"parallel_decoding": True, "action_dim": 7, "use_film": True, "text_config": {"hidden_size": 64}}
    fields.update(vision_backbone_id="dinosiglip-vit-so-224px", timm_model_kwargs=[SMALL, SMALL])
    one, two = (fill(PrismaticVisionBackbone(OpenVLAConfig(**fields, num_images_in_input=n))) for n in (1, 2))
    generator = torch.Generator().manual_seed(0)
    pixels, words = torch.randn(2, 12, 224, 224, generator=generator), torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        features = two(pixels, words)
        alone = [[one(image[None], word[None]) for image in sample.split(6)] for sample, word in zip(pixels, words)]
        other = two(pixels, words.flip(0))
    expected = torch.cat([torch.cat(images, dim=1) for images in alone])
    torch.testing.assert_close(features, expected, rtol=0, atol=FEATURE_ATOL)
    assert (features - other).abs().amax(dim=(1, 2)).min() > 100 * FEATURE_ATOL


@pytest.mark.lane
def test_film_that_is_not_trained_changes_nothing():
    arguments = ("vit_large_patch14_reg4_dinov2.lvd142m", 224, None, SMALL)
    plain, film = fill(VisionTower(*arguments)), VisionTower(*arguments)
    for block in film.blocks:
        block.add_film(64)
    added = film.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(added) == 4 * SMALL["depth"]
    pixels, words = torch.randn(1, 3, 224, 224), torch.randn(1, 64)
    with torch.no_grad():
        assert torch.equal(film(pixels, words), plain(pixels))


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (1, 6, 200, 224), (6, 224, 224)])
def test_wrong_pixel_values_are_refused(tiny, shape):
    with pytest.raises(ValueError, match=r"\(batch, 6, 224, 224\)"):
        tiny.model.vision_backbone(torch.zeros(shape))


@pytest.mark.timm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("timm_id", "size", "activation"),
    sorted({tower for towers in VISION_BACKBONES.values() for tower in towers}, key=str),
)
def test_bit_equal_to_timm(timm_id, size, activation, dtype):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(timm_id, pretrained=False, num_classes=0, img_size=size, act_layer=activation, **SMALL)
    theirs = fill(theirs)
    ours = VisionTower(timm_id, size, activation, SMALL)
    weights = {name.replace(".gamma", ".scale_factor"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    ours, theirs = ours.eval().to(dtype), theirs.to(dtype)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = theirs.get_intermediate_layers(pixels, n={len(theirs.blocks) - 2})[0]
        assert torch.equal(ours(pixels), expected)
