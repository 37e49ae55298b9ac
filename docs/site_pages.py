"""Add files from outside docs/ to the site as pages, so that each text exists once.

mkdocs calls the functions named ``on_...`` (``hooks`` in mkdocs.yml). Links are written for the repository and are
rewritten here for the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parent.parent
# File outside docs/: its page.
PAGES = {
    "README.md": "index.md",
    "assets/libero/README.md": "embedded.md",
    "assets/libero_oft/README.md": "embedded-oft.md",
    "PARITY.md": "parity.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
RESULTS = ("chunks", "conversion", "cpu", "libero", "loader", "quantization", "serving", "training")
PAGES |= {f"benchmarks/results/{name}.md": f"results-{name}.md" for name in RESULTS}
LINK = re.compile(r"(?<=\]\()[\w./-]+(?=[#)])")


def on_files(files, config):
    """Add the pages, images and notebooks."""
    for name, page in PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the Hub's model card metadata
        files.append(File.generated(config, page, content=_on_the_site(text, posixpath.dirname(name))))
    for linked in sorted([*REPOSITORY.glob("assets/*.[jp]*g"), *REPOSITORY.glob("examples/*.ipynb")]):
        files.append(File.generated(config, str(linked.relative_to(REPOSITORY)), abs_src_path=str(linked)))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrite the links of a page that lead out of docs/."""
    return _on_the_site(markdown, "docs")


def _on_the_site(text, folder):
    """Return a folder's text with its links rewritten for the site."""

    def place(link):
        target = posixpath.normpath(posixpath.join(folder, link[0])).removeprefix("docs/")
        return PAGES.get(target, target)

    return LINK.sub(place, text)
