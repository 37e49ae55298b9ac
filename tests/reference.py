"""Where the reference's outputs lie, and how closely they are met."""

import bz2
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load, load_file

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
FIXTURES = Path(__file__).parent / "fixtures"
PACKAGE_FOLDERS = ("adapters", "benchmarking", "conversion", "data", "evaluation", "inference", "serving", "training")
MODULES = sorted(
    [*REPOSITORY.glob("*.py"), *(path for name in PACKAGE_FOLDERS for path in (REPOSITORY / name).glob("*.py"))]
)


def module_name(path):
    """Return a module's path in the repository without its suffix: ``data/episodes``."""
    return path.relative_to(REPOSITORY).with_suffix("").as_posix()


# The golden numbers come from a CPU with AVX-512. On one with AVX2 only, the unmodified reference itself differs from
# them by up to 1.8e-4 in logits and 8e-5 in features (which reach 21), and this package equals that reference in every
# bit (PARITY.md). Token ids and actions are compared exactly everywhere.
LOGIT_ATOL = 5e-4
FEATURE_ATOL = 5e-4
LOSS_ATOL = 1e-5
GRADIENT_ATOL = 1e-4


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


def published_folder(name, folder, **changes):
    """A golden checkpoint as it would lie on the Hub: old auto_map, old names, and a tokenizer."""
    from openvla.tiny import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    source = GOLDEN / name
    config = json.loads((source / "config_automap.json").read_text())
    sizes = json.loads((source / "tiny_timm_overrides.json").read_text())
    config["timm_model_kwargs"] = [sizes[timm_id] for timm_id in config["timm_model_ids"]]
    write_json(folder / "config.json", {**config, **changes})
    (folder / "model.safetensors").write_bytes(bz2.decompress((source / "model.safetensors.bz2").read_bytes()))
    shutil.copy(source / "generation_config.json", folder)
    shutil.copy(source / "dataset_statistics.json", folder)
    preprocessor = json.loads((source / "preprocessor_config.json").read_text())
    preprocessor["processor_class"] = "PrismaticProcessor"
    preprocessor["auto_map"] = {
        "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
        "AutoProcessor": "processing_prismatic.PrismaticProcessor",
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    build_tokenizer().save_pretrained(folder)
    return folder


def native_run(name, folder):
    """A golden native run directory."""
    source = GOLDEN / f"native_{name}"
    (folder / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "dataset_statistics.json"):
        shutil.copy(source / file, folder)
    packed = source / "checkpoints" / "latest-checkpoint.pt.bz2"
    (folder / "checkpoints" / "latest-checkpoint.pt").write_bytes(bz2.decompress(packed.read_bytes()))
    return folder


def digests(tensors):
    """sha256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


# What of the golden heads a model takes, and under which name: by action_head.
OFT_HEADS = {None: {}, "l1": {"action_head": "action_head"}}
OFT_HEADS["diffusion"] = {"diffusion_head": "action_head", "noisy_action_projector": "noisy_action_projector"}


def oft_parts(platform, head, proprio=True):
    """Tensors of the golden heads, by the part that they are of."""
    names = {**OFT_HEADS[head], **({"proprio_projector": "proprio_projector"} if proprio else {})}
    parts = {part: {} for part in names.values()}
    for name, tensor in load_file(GOLDEN / f"oft_{platform}" / "heads.safetensors").items():
        part, _, rest = name.partition(".")
        if part in names:
            parts[names[part]][rest] = tensor
    return parts


def oft_model(platform, head, images=2, proprio=True, **fields):
    """The golden OpenVLA-OFT model, float32 in eval mode."""
    from openvla import PLATFORMS, OpenVLAConfig, OpenVLAForActionPrediction

    source = GOLDEN / "fused"
    config = json.loads((source / "config.json").read_text())
    sizes = json.loads((source / "tiny_timm_overrides.json").read_text())
    del config["torch_dtype"]
    config.update(PLATFORMS[platform], parallel_decoding=True, action_head=head, num_images_in_input=images)
    config["timm_model_kwargs"] = [sizes[timm_id] for timm_id in config["timm_model_ids"]]
    config["norm_stats"] = json.loads((GOLDEN / f"oft_{platform}" / "dataset_statistics.json").read_text())
    if not proprio:
        config["proprio_dim"] = None
    model = OpenVLAForActionPrediction(OpenVLAConfig.from_dict({**config, **fields}))
    tensors = load(bz2.decompress((source / "model.safetensors.bz2").read_bytes()))
    for part, content in oft_parts(platform, head, proprio).items():
        tensors.update({f"{part}.{name}": tensor for name, tensor in content.items()})
    left, surplus = model.load_state_dict(tensors, strict=False)
    assert not surplus
    assert all(".scale." in name or ".shift." in name for name in left)
    return model.eval()


def oft_folder(platform, head, folder, prefix=""):
    """A golden OFT checkpoint as it was published: part files beside the model, norm_stats in their own file."""
    from openvla.tiny import build_tokenizer

    published_folder("fused", folder, norm_stats=None)
    for file in folder.glob("*token*"):
        file.unlink()
    build_tokenizer(32000, pad_token=None).save_pretrained(folder)
    shutil.copy(GOLDEN / f"oft_{platform}" / "dataset_statistics.json", folder)
    for part, content in oft_parts(platform, head).items():
        content = {f"{prefix}{name}": tensor for name, tensor in content.items()}
        torch.save(content, folder / f"{part}--150000_checkpoint.pt")
    return folder
