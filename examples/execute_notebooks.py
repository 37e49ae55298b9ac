"""Run the notebooks of this folder and write them back with their outputs.

    python examples/execute_notebooks.py [NOTEBOOK ...]

Each runs in its own kernel, in a copy of this folder, on one CPU thread and without a network. The outputs show nothing
of the machine: no times, no paths, no progress bars; images are reduced to 256 colours.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
LANGUAGE = {"language_info": {"name": "python"}}
# nbval's name for cells whose output differs from machine to machine: it is shown, and not compared.
VARIES = "nbval-ignore-output"
# What bitsandbytes says on processors with bfloat16 arithmetic alone.
OF_THE_PROCESSOR = "Failed to load CPU gemm_4bit_forward"
# What we say of 8-bit weights on any CPU; elsewhere it follows the line above, in one output.
OF_8_BITS = "8-bit weights are slow on a CPU"
# Where a user's own settings would lead a notebook elsewhere: to a Hub, to a cache.
PERSONAL = ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "MPLBACKEND")


def executed(path: Path, timeout: float = 600) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a fresh run.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised, or took longer than ``timeout`` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        here = Path(place) / "examples"
        here.mkdir()
        for file in EXAMPLES.glob("*.py"):
            shutil.copy(file, here)
        (Path(place) / "tests").mkdir()
        shutil.copy(EXAMPLES.parent / "tests" / "hub.py", Path(place) / "tests")
        environment = {name: value for name, value in os.environ.items() if name not in PERSONAL}
        environment |= {"IPYTHONDIR": f"{place}/ipython", "OPENVLA_CACHE": f"{place}/cache", "TMPDIR": place}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # A kernel without ipywidgets is told by tqdm that its bars will be text; there are none.
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
        settings = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
        client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(here)}}, **settings)
        client.execute(env=environment)
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove everything that differs by run or machine from the notebook, in place, and return it."""
    notebook.metadata = nbformat.from_dict({**KERNEL, **LANGUAGE})
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [
            output for output in cell.outputs if not output.get("text", "").startswith((OF_THE_PROCESSOR, OF_8_BITS))
        ]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
                output.data.pop("text/plain", None)  # <Figure size ...>
    return notebook


def smaller(picture: str) -> str:
    """Return a base64 PNG in 256 colours; one that has a palette already is unchanged."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def shown(cell: nbformat.NotebookNode) -> list[Any]:
    """Return the outputs of a cell in order: kind, and text except for images."""
    found: list[Any] = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            found.append((output.name, output.text))
        else:
            data = output.get("data", {})
            found += [(kind, None if kind.startswith("image/") else content) for kind, content in sorted(data.items())]
    return found


def main(paths: list[str]) -> int:
    """Run and rewrite notebooks; return the exit status."""
    for path in [Path(name) for name in paths] or NOTEBOOKS:
        notebook = executed(path)
        temporary = path.with_name(f".{path.name}.tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
