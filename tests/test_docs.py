"""The README and docs/ do what they say: every page is one session, its blocks run in order in one folder.

Hub ids of the texts are answered by a Hub on loopback that holds tiny models under these names; nothing else of a block
is changed but what stands in ``REPLACED`` and ``ADDED``.
"""

import importlib
import re
import runpy
import shlex
import shutil

import minivla
import numpy as np
import pytest
import transformers
from hub import upload_folder
from openvla import __main__ as command_line
from openvla.tiny import build_tokenizer
from openvla.training import config as finetune_config
from PIL import Image
from reference import FIXTURES, REPOSITORY, native_run, oft_folder, published_folder, write_json
from tracevla import published_tracevla

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# There is no GPU here, the tiny model's towers have sizes that no registry knows, and its random weights give other
# tokens than an action's.
REPLACED = {
    'device_map="cuda"': 'device_map="cpu"',
    'load_policy("my-minivla", ': 'load_policy("my-minivla", constrain_actions=True, ',
    'load_policy("openvla/openvla-7b", ': 'load_policy("openvla/openvla-7b", constrain_actions=True, ',
    'load_policy("my-tracevla", ': 'load_policy("my-tracevla", constrain_actions=True, ',
}
ADDED = {
    "predict --model openvla/openvla-7b": ["--constrain-actions"],
    "convert runs/my-run my-openvla": ["--config-overrides", "sizes.json"],
    "convert runs/minivla my-minivla": ["--config-overrides", "minivla.json"],
    "finetune": shlex.split(
        "--max-steps 1 --per-device-train-batch-size 2 --num-train-eval-samples 2 --use-cpu --report-to tensorboard"
    ),
    "train-vq": shlex.split("--batch-size 4 --epochs 1 --latent-dim 16"),
    "bench": shlex.split("--sizes tiny --repeats-per-question 1 --inputs 2"),
}
# Of these commands, of what torchrun launches and of what runs beside the published code, only arguments (and a run's
# YAML file) are checked, since they take a simulator, downloads, many processes, or that code.
ARGUMENTS_ONLY = {"evaluate", "assemble"}
NEW_NAMES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
# What begins so is compiled, not run; how often each page may do that.
NOT_RUN = "# Not run in CI:"
MARKED = {"data.md": 4, "integrations.md": 2, "migration.md": 4, "quantising.md": 1}
MARKED |= {"reinforcement-learning.md": 3, "serving.md": 7, "tracevla.md": 2}


def blocks(page):
    """Language, code and line of every block."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], match[2], text[: match.start()].count("\n") + 2) for match in BLOCK.finditer(text)]


@pytest.fixture(scope="session")
def given(hub, tokenizer, overrides, tmp_path_factory):
    """A folder that holds what the texts take for granted; their models are on the Hub."""
    pytest.importorskip("google_crc32c")
    pytest.importorskip("h5py")
    folder, models = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("models")
    plain = published_folder("fused", models / "plain", pad_token_id=build_tokenizer().pad_token_id)
    upload_folder(hub, "openvla/openvla-7b", plain)
    upload_folder(hub, "someone/openvla-7b-finetuned", plain)
    upload_folder(hub, "moojink/openvla-7b-oft-finetuned-libero-spatial", oft_folder("libero", "l1", models / "oft"))
    upload_folder(hub, "me/my-demonstrations", FIXTURES / "lerobot_v3_files")
    upload_folder(hub, "furonghuang-lab/tracevla_7b", published_tracevla(models / "tracevla"))
    native_run("fused", folder / "runs" / "my-run")
    minivla.write_run("vq_libero", folder / "runs" / "minivla")
    minivla.write_vq(folder / "vq")
    shutil.copytree(minivla.MINIVLA / "llm", folder / "qwen-tokenizer")
    write_json(folder / "minivla.json", minivla.OVERRIDES)
    shutil.copytree(plain, folder / "old-finetune")
    shutil.copytree(tokenizer, folder / "llama-2-tokenizer")
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    shutil.copytree(FIXTURES / "bridge_orig", folder / "datasets" / "bridge_orig")
    runpy.run_path(str(REPOSITORY / "examples" / "toy.py"))["demonstrations"](folder / "my-demonstrations")
    write_json(folder / "sizes.json", overrides["fused"])
    for name in ("frame.png", "main.png", "wrist.png"):
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def place(given, here, tmp_path, monkeypatch):
    """Where a page is worked through."""
    monkeypatch.chdir(shutil.copytree(given, tmp_path / "place"))
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["example"])


def run_python(code, names, where):
    for written, here in REPLACED.items():
        code = code.replace(written, here)
    exec(compile(code, where, "exec"), names)  # noqa: S102
    if "action" in names:
        assert names["action"].shape == (7,), where
        assert names["action"].dtype == np.float64, where


def run_shell(code, where, monkeypatch, capsys):
    """Every command of a block: ours run here, of the others it is checked that what they name is there."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|^#.*", line):
            words = shlex.split(command, comments=True)
            match words:
                case []:
                    pass
                case ["make", verb]:
                    assert re.search(rf"^{verb}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), where
                case ["pip", "install", what] | ["pip", "install", what, "./assets"]:
                    for extra in re.findall(r"\[(.*)\]", what):
                        assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
                case ["apt-get", "install", *_]:
                    pass
                case ["lerobot-train" | "lerobot-eval" | "lerobot-rollout", *_] | [
                    "python",
                    "-m",
                    "lerobot_policy_openvla",
                    *_,
                ]:
                    pass  # integrations/lerobot_policy_openvla/tests/test_page.py runs them
                case ["python", file]:
                    runpy.run_path(file, run_name="__main__")
                case ["openvla" | "torchrun" | "python", *_]:
                    start = 1 if words[0] == "openvla" else words.index("openvla") + 1
                    with monkeypatch.context() as patch:
                        if words[0] == "torchrun" or words[start] in ARGUMENTS_ONLY or "--reference" in words:
                            module = importlib.import_module(f"openvla.{command_line.COMMANDS[words[start]][0]}")
                            patch.setattr(module, "run", check_arguments)
                        run_command(words[start:], where, capsys)
                case _:
                    pytest.fail(f"{where}: nobody has said how to check {command!r}")


def run_command(arguments, where, capsys):
    for start, more in ADDED.items():
        if " ".join(arguments).startswith(start):
            arguments = [*arguments, *more]
    assert command_line.main(arguments) == 0, f"{where}: {capsys.readouterr().err}"


def check_arguments(args):
    """In the place of a command: its YAML file and flags make a run."""
    if args.command == "finetune":
        given = {key: value for key, value in vars(args).items() if value is not None}
        del given["command"], given["dry_run"]
        file = given.pop("config", None)
        finetune_config.config_from_dict({**(finetune_config.read_yaml(file) if file else {}), **given})
    return 0


@pytest.mark.skipif(not NEW_NAMES, reason="the pages show the names of newer versions")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_block_runs(page, place, monkeypatch, capsys):
    names = {}
    for language, code, line in blocks(page):
        where = f"{page.name}:{line}"
        if language == "python" and code.startswith(NOT_RUN):
            compile(code, where, "exec")
        elif language == "python":
            run_python(code, names, where)
        elif language == "bash" and not code.startswith(NOT_RUN):
            run_shell(code, where, monkeypatch, capsys)


def test_few_blocks_are_not_run():
    """The list cannot grow silently, and no other language is without a check."""
    marked = {page.name: sum(code.startswith(NOT_RUN) for _, code, _ in blocks(page)) for page in PAGES}
    assert {name: count for name, count in marked.items() if count} == MARKED
    assert {language for page in PAGES for language, _, _ in blocks(page)} <= {"python", "bash", "yaml", "text"}


def test_the_first_screen_shows_the_two_commands():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert re.findall(r"^make (\w+)", readme.split("## Install")[0], flags=re.MULTILINE) == ["demo", "test"]
    assert len(readme.splitlines()) <= 120


def test_public_names_are_documented():
    import openvla

    named = re.findall(r"^::: openvla\.(\w+)$", (REPOSITORY / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(openvla.__all__)


@pytest.mark.parametrize("page", [*PAGES[1:], *REPOSITORY.glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files; anchors too are checked by ``make docs``, which builds the site strictly."""
    for target in re.findall(r"\]\(([^)#]+)[)#]", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).is_file(), target
