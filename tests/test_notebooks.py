"""Notebooks of examples/: their committed outputs equal those of a fresh run."""

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

from execute_notebooks import NOTEBOOKS, VARIES, cleaned, executed, shown  # noqa: E402

LARGEST = 300_000  # bytes of a file
# These train for half a minute.
LONG = {"03_finetune_lora", "04_oft"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request):
    return nbformat.read(request.param, as_version=4)


def test_all_notebooks_exist():
    names = ["01_predict", "02_quantise", "03_finetune_lora", "04_oft", "05_publish"]
    assert [path.stem for path in NOTEBOOKS] == names


def test_notebook_is_clean(committed):
    """A notebook is short, run in order, has images, and shows nothing of the machine that ran it."""
    assert 8 <= len(committed.cells) <= 15
    assert cleaned(nbformat.from_dict(committed)) == committed
    kinds, texts = [], []
    for cell in committed.cells:
        for kind, text in shown(cell):
            kinds.append(kind)
            texts.append(text or "")
    assert "image/png" in kinds
    assert "stderr" not in kinds
    assert not any(output.output_type == "error" for cell in committed.cells for output in cell.get("outputs", []))
    for trace in ("/tmp", "/home", "/root", "/work", "Users", "127.0.0.1", "Warning", "it/s"):
        assert trace not in "".join(texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small(path):
    assert path.stat().st_size <= LARGEST


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem) for path in NOTEBOOKS]
)
def test_fresh_run_equals_the_committed_outputs(path):
    """Compare every cell's text and the presence of images; only the kinds of output where numbers vary by machine."""
    committed, fresh = nbformat.read(path, as_version=4), executed(path)
    assert len(committed.cells) == len(fresh.cells)
    for before, after in zip(committed.cells, fresh.cells):
        varies = VARIES in before.metadata.get("tags", [])
        old, new = ([entry[0] for entry in shown(cell)] if varies else shown(cell) for cell in (before, after))
        assert new == old, f"{path.name} shows something else now; if it should: make notebooks\n{before.source}"


def test_failing_notebook_raises(tmp_path):
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import openvla_that_is_not_there")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="openvla_that_is_not_there"):
        executed(tmp_path / "broken.ipynb")
