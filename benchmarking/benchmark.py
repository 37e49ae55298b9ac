"""``openvla bench``: how fast an action is made, side by side with a peer, and whether it is the same action.

All sides take turns, one answer each, in resident processes; medians and quartiles are reported. The ceilings (matrix
products, reading memory) are measured in the same run, and beside every speed stands how many answers equal those of
the side that is compared with, and in other dtypes than float32 how many equal float32's. Weights are random, from a
seed, and the same for every side.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import write_json
from ..decoding_openvla import decode_greedily
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..inference.cpu_prepack import has_matmul, prepack
from ..inference.cuda_graphs import run_graphed
from ..inference.fast_decoder import compile_pointwise, decode_fast
from ..loading import AutoProcessor
from ..modeling_openvla import OpenVLAForActionPrediction
from . import reference as reference_script
from .reference import ACTION, BATCH, FIRST_TOKEN, PIXELS, TOWERS, batch_of, preprocessing, timed
from .sizes import SIZES, sample_inputs, write_model

WARM = 2
STEP = "a decode step"  # the rest of the tokens, after the first
ROWS = {"action": ACTION, "pixels": PIXELS, "first-token": FIRST_TOKEN, "towers": TOWERS, "batch": BATCH}
REFERENCE, PLAIN, FAST = "reference", "openvla, fast=False", "openvla"
DRAFTED, MISLED = "openvla, draft all right", "openvla, draft all wrong"
PREPACKED = "openvla, prepack"
COMPILED = "openvla, compile"
STATIC_CACHE = "transformers, static cache"  # its own way to be fast, which it compiles by itself on a GPU

Work = dict[str, Callable[[int], Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla bench``."""
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny-deep", "eighth"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, "preprocessing"], help="default all; on a CPU all but batch"
    )
    parser.add_argument("--pairs", type=int, default=20, help="turns of every side")
    parser.add_argument("--inputs", type=int, default=64, help="images and instructions, one after the other")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="one more side, its small operations fused")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the published remote code, to run beside")
    parser.add_argument(
        "--reference-python", metavar="PY", help="Python with transformers 4.40.1, timm 0.9.16, torchvision"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them (needs the extra: openvla[plot])")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit status."""
    if (args.reference is None) != (args.reference_python is None):
        raise OpenVLAValueError("--reference (the code) and --reference-python (what runs it) belong together.")
    if args.pairs < 1 or args.inputs < 1:
        raise OpenVLAValueError("--pairs and --inputs must be at least 1.")
    args.rows = args.rows or [row for row in (*ROWS, "preprocessing") if row != "batch" or _on_gpu(args.device)]
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(args), "rows": [], "not run": not_run(args)}
    for size in args.sizes:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as place:
                report["rows"] += measure(size, dtype, args, Path(place), report["machine"])
    print("\n".join(table(report)))
    if args.json:
        write_json(args.json, report)
    if args.plot:
        draw(report, args.plot)
    return 0


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What ran this, and how fast it can be."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    described = {
        "device": torch.cuda.get_device_name(args.device)
        if _on_gpu(args.device)
        else (names or [platform.processor()])[0],
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    rates = {f"{name} GFLOP/s": gemm_rate(args.device, getattr(torch, name)) / 1e9 for name in args.dtypes}
    return described | rates | {"read GB/s": read_rate(args.device) / 1e9}


def not_run(args: argparse.Namespace) -> list[str]:
    """What this run leaves open, and why."""
    left = [] if args.reference else ["beside the published code: --reference and --reference-python were not given"]
    if not _on_gpu(args.device):
        why = "--device was cpu" if torch.cuda.is_available() else "there is none here"
        left.append(f"on a GPU: {why}")
    return left


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if _on_gpu(device) else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda _: a @ b, 0, device)["seconds"] for _ in range(5))


def read_rate(device: str) -> float:
    """Bytes a second of reading much memory."""
    data = torch.ones(2**28 if _on_gpu(device) else 2**27, device=device)
    return data.nbytes / min(timed(lambda _: data.sum(), 0, device)["seconds"] for _ in range(5))


def measure(size: str, dtype: str, args: argparse.Namespace, place: Path, ceilings: dict[str, Any]) -> list[dict]:
    """All rows of one size and dtype."""
    write_model(size, place / "model")
    model, processor, prompts, images = prepare(place / "model", dtype, args)
    np.savez(place / "inputs.npz", images=images, **{f"ids_{i}": ids[0].cpu().numpy() for i, ids in enumerate(prompts)})
    sides = own_sides(model, processor, prompts, images, args.compile)
    exact = None if dtype == "float32" else exact_answers(place / "model", args)
    peer = None
    if args.reference:
        peer = reference(args, place, dtype)
        ceilings["versions"]["reference"] = peer.ready
        rows = next(iter(sides.values()))
        sides = {REFERENCE: {row: functools.partial(peer.ask, row) for row in rows}, **sides}
    try:
        asked = [ROWS[row] for row in args.rows if row in ROWS]
        asked += preprocessing(processor.image_processor) if "preprocessing" in args.rows else []
        rows = [
            {"size": size, "dtype": dtype, "row": row, **figures}
            for row in asked
            for figures in compare(
                row, {name: work for name, work in sides.items() if row in work}, args, exact if row == ACTION else None
            )
        ]
    finally:
        if peer:
            peer.stop()
    rows += decode_steps(rows, model)
    floors = floors_of(model, sides[PLAIN], asked, ceilings[f"{dtype} GFLOP/s"], ceilings["read GB/s"])
    for figures in rows:
        if figures["row"] in floors:
            figures["share of the floor"] = floors[figures["row"]] / figures["seconds"]
    return rows


def prepare(folder: Path, dtype: str, args: argparse.Namespace) -> tuple[Any, Any, list[torch.Tensor], np.ndarray]:
    """The model, its processor, and prompts and images."""
    keywords = {DTYPE_FIELD: getattr(torch, dtype)}
    model = OpenVLAForActionPrediction.from_pretrained(folder, **keywords).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    texts, images = sample_inputs(args.inputs)
    prompts = [processor(instruction=text, images=images[0])["input_ids"].to(args.device) for text in texts]
    return model, processor, prompts, images


def answer(model: Any, processor: Any, prompt: torch.Tensor, image: np.ndarray, **options: Any) -> Any:
    """The ``ActionOutput`` for a prompt and an image, by way of ``options``."""
    return model.predict_action(prompt, pixels_of(model, processor, image), return_dict=True, **options)


def pixels_of(model: Any, processor: Any, image: np.ndarray) -> torch.Tensor:
    """An image as the model takes it."""
    return processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)


def own_sides(
    model: Any, processor: Any, prompts: list[torch.Tensor], images: np.ndarray, compiled: bool
) -> dict[str, Work]:
    """Ways of this package to fill the rows, each ``index of the input -> tokens``, or features of the towers."""
    drafts: dict[tuple[str, int], np.ndarray] = {}
    pixels = [pixels_of(model, processor, image) for image in images]

    def action(index: int, draft: str | None = None, model: Any = model, **options: Any) -> list[int]:
        if draft:
            options["draft"] = drafts[draft, index]
        output = answer(model, processor, prompts[index], images[index], **options)
        if not draft:
            drafts[DRAFTED, index], drafts[MISLED, index] = output.actions, -output.actions + 0.013
        return output.token_ids.tolist()

    def batch(index: int, fast: bool) -> list[list[int]]:
        rows = batch_of(index, len(prompts))
        ids = pad_sequence([prompts[row][0] for row in rows], batch_first=True, padding_value=model.pad_token_id)
        mask = pad_sequence([torch.ones_like(prompts[row][0]) for row in rows], batch_first=True)
        images = torch.cat([pixels[row] for row in rows])
        return model.predict_action(ids, images, mask, return_dict=True, fast=fast).token_ids.tolist()

    def from_pixels(index: int, fast: bool) -> list[int]:
        return model.predict_action(prompts[index], pixels[index], return_dict=True, fast=fast).token_ids.tolist()

    def first_of(ids: torch.Tensor, pixel_values: torch.Tensor, fast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask, _, _ = model.embed_inputs(ids, pixel_values)
        asked = model.language_model, embeds, mask, 1
        return decode_fast(*asked) if fast else decode_greedily(*asked, end_ids=None)

    @torch.no_grad()
    def first_token(index: int, fast: bool) -> list[int]:
        compute = functools.partial(first_of, fast=fast)
        given = prompts[index], pixels[index]
        tokens, _ = run_graphed(model, compute, given, FIRST_TOKEN) if fast else compute(*given)
        return tokens[0].tolist()

    @torch.no_grad()
    def towers(index: int, fast: bool) -> np.ndarray:
        def compute(pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
            return (model.vision_backbone(pixel_values),)

        (features,) = run_graphed(model, compute, [pixels[index]], TOWERS) if fast else compute(pixels[index])
        return features.float().cpu().numpy()

    rows = {ACTION: action, PIXELS: from_pixels, FIRST_TOKEN: first_token, TOWERS: towers, BATCH: batch}

    def every_row(fast: bool) -> Work:
        return {row: functools.partial(work, fast=fast) for row, work in rows.items()}

    sides = {
        PLAIN: {**every_row(fast=False), **preprocessing(processor.image_processor)},
        STATIC_CACHE: {ACTION: lambda index: action(index, cache_implementation="static")},
        FAST: every_row(fast=True),
        DRAFTED: {ACTION: lambda index: action(index, DRAFTED, fast=True)},
        MISLED: {ACTION: lambda index: action(index, MISLED, fast=True)},
    }
    if compiled:
        fused = copy.copy(model)  # of the same weights
        fused._modules = {**model._modules, "language_model": copy.copy(model.language_model)}
        compile_pointwise(fused)
        sides[COMPILED] = {ACTION: lambda index: action(index, model=fused, fast=True)}
    if model.device.type == "cpu" and has_matmul(model.dtype):
        prepacked = copy.deepcopy(model)
        prepack(prepacked)
        sides[PREPACKED] = {ACTION: lambda index: action(index, model=prepacked, fast=True)}
    return sides


def exact_answers(folder: Path, args: argparse.Namespace) -> list[list[int]]:
    """The tokens of every input in float32: where rounding turns a near tie over, this is what is right."""
    model, processor, prompts, images = prepare(folder, "float32", args)
    inputs = tqdm(zip(prompts, images), total=len(prompts), desc="in float32", unit="input", file=sys.stderr)
    return [answer(model, processor, *given, fast=False).token_ids.tolist() for given in inputs]


class Resident:
    """A process that loads once and then answers a line with a line, in an environment of its own.

    Args:
        command: Starts it.
        environment: In place of this process's own.

    Attributes:
        ready: What it said when it had loaded.
    """

    def __init__(self, command: Sequence[Any], environment: Mapping[str, str] | None = None) -> None:
        words = [str(word) for word in command]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer("READY ")

    def _answer(self, mark: str) -> Any:
        for line in self.process.stdout:
            if line.startswith(mark):
                return json.loads(line[len(mark) :])
        raise RuntimeError(f"{self.process.args[1]} ended with status {self.process.wait()}; it said why above.")

    def ask(self, *what: Any) -> dict[str, Any]:
        """An answer, timed there."""
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer("DONE ")

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def reference(args: argparse.Namespace, place: Path, dtype: str) -> Resident:
    """The reference, resident."""
    command = [args.reference_python, reference_script.__file__, args.reference, place / "model"]
    return Resident(
        [*command, place / "inputs.npz", "--dtype", dtype, "--device", args.device, "--threads", args.threads]
    )


def compare(
    row: str, sides: dict[str, Work], args: argparse.Namespace, exact: list[list[int]] | None = None
) -> list[dict[str, Any]]:
    """Every side's figures in one row, the sides in turn.

    Args:
        row: What is measured.
        sides: What does it, by name.
        args: How often.
        exact: The right result of every input, where it is known.
    """
    seen: dict[str, list[dict]] = {name: [] for name in sides}
    turns = max(args.pairs + WARM, args.inputs if row == ACTION else 0)
    for turn in tqdm(range(turns), desc=row, unit="turn", file=sys.stderr):
        for name, work in sides.items():
            index = turn % args.inputs
            answered = work[row](index) if name == REFERENCE else timed(work[row], index, args.device)
            seen[name].append(answered)
    first = next(iter(sides))
    rows = []
    for name, answers in seen.items():
        seconds, cpu = (np.array([answer[field] for answer in answers[WARM:]]) for field in ("seconds", "cpu"))
        base = np.array([answer["seconds"] for answer in seen[first][WARM:]])
        equal = np.concatenate(
            [
                np.atleast_1d(np.array(answer["result"]) == np.array(other["result"]))
                for answer, other in zip(answers, seen[first])
            ]
        )
        low, high = np.quantile(seconds, [0.25, 0.75])
        figures = {"side": name, "seconds": float(np.median(seconds)), "quartiles": [float(low), float(high)]}
        figures |= {"cpu seconds": float(np.median(cpu)), "faster": float(np.median(base / seconds))}
        figures["first seconds"] = [answer["seconds"] for answer in answers[:WARM]]  # the second records on a GPU
        if "GPU bytes" in answers[0]:
            figures["GPU bytes"] = max(answer["GPU bytes"] for answer in answers)
        if exact is not None:
            right = [exact[turn % args.inputs] for turn in range(turns)]
            figures["equal to float32"] = int((np.array([answer["result"] for answer in answers]) == right).sum())
        rows.append(figures | {"compared with": first, "equal": int(equal.sum()), "of": int(equal.size)})
    return rows


def decode_steps(rows: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """A decode step of every side: an even share of what an action takes beyond its first token, of the medians."""
    by_side = {(row["row"], row["side"]): row for row in rows}
    steps = []
    for (row, side), whole in by_side.items():
        if row == PIXELS and (FIRST_TOKEN, side) in by_side:
            first, later = by_side[FIRST_TOKEN, side], model.get_action_dim() - 1
            took = {field: (whole[field] - first[field]) / later for field in ("seconds", "cpu seconds")}
            steps.append({field: whole[field] for field in ("size", "dtype", "side", "compared with")} | took)
    return [{**step, "row": STEP, "faster": steps[0]["seconds"] / step["seconds"]} for step in steps]


def floors_of(model: Any, plain: Work, rows: Sequence[str], gflops: float, gbytes: float) -> dict[str, float]:
    """Seconds that a row's arithmetic alone would take, and reading the language model for every decode step."""
    step = sum(parameter.nbytes for parameter in model.language_model.parameters()) / gbytes / 1e9
    floors = {STEP: step}
    for row in set(rows) & set(ROWS.values()):
        with FlopCounterMode(display=False) as counter:
            plain[row](0)
        steps = model.get_action_dim() - 1 if row in (ACTION, PIXELS, BATCH) else 0
        floors[row] = counter.get_total_flops() / gflops / 1e9 + steps * step
    return floors


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines of Markdown."""
    lines = [", ".join(f"{name} {_short(value)}" for name, value in report["machine"].items()), ""]
    columns = "size, dtype, row, side, ms (quartiles), CPU ms, faster, share of the floor, equal, equal to float32"
    columns = columns.split(", ") + ["GPU MB"] * any("GPU bytes" in row for row in report["rows"])
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report["rows"]:
        low, high = (1e3 * quartile for quartile in row.get("quartiles", [0, 0]))
        cells = [row["size"], row["dtype"], row["row"], row["side"]]
        cells += [f"{1e3 * row['seconds']:.1f}" + (f" ({low:.1f}-{high:.1f})" if high else "")]
        cells += [f"{1e3 * row['cpu seconds']:.1f}", f"{row['faster']:.2f}x"]
        cells += [f"{row['share of the floor']:.2f}" if "share of the floor" in row else ""]
        cells += [f"{row[field]} of {row['of']}" if field in row else "" for field in ("equal", "equal to float32")]
        cells += [f"{row['GPU bytes'] / 1e6:.0f}"] if "GPU bytes" in row else []
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *[f"Not run {left}." for left in report["not run"]]]


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)


def draw(report: dict[str, Any], file: Path) -> None:
    """The actions' times as bars, a panel a size and dtype, with the floor as a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OpenVLAImportError('A picture needs matplotlib: pip install "openvla[plot]".') from error
    rows = [row for row in report["rows"] if row["row"] == ACTION]
    panels = list(dict.fromkeys((row["size"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        shown = [row for row in rows if (row["size"], row["dtype"]) == panel]
        milliseconds = [1e3 * row["seconds"] for row in shown]
        spread = np.abs(1e3 * np.array([row["quartiles"] for row in shown]).T - milliseconds)
        axes.barh([row["side"] for row in shown], milliseconds, xerr=spread, color="tab:blue")
        axes.axvline(milliseconds[0] * shown[0]["share of the floor"], color="tab:red", label="floor")
        axes.invert_yaxis()
        axes.set(title=f"{ACTION}: {', '.join(panel)}", xlabel="ms")
        axes.legend(loc="lower right")
    figure.savefig(file)
