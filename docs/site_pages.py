"""Makes pages of the site out of the files at the repository's root, so that each text has one home.

mkdocs calls what is named ``on_…`` (``hooks`` in mkdocs.yml). Links are written as they work in the repository and are
turned here into what works on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parent.parent
# Which page of the site a file outside docs/ becomes.
PAGES = {
    "README.md": "index.md",
    "assets/libero/README.md": "embedded.md",
    "assets/libero_oft/README.md": "embedded-oft.md",
    "PARITY.md": "parity.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()[\w./-]+(?=[#)])")


def on_files(files, config):
    """Add the pages, the pictures and the notebooks."""
    for name, page in PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # what the Hub reads of a model card
        files.append(File.generated(config, page, content=_on_the_site(text, posixpath.dirname(name))))
    for linked in sorted([*REPOSITORY.glob("assets/*.[jp]*g"), *REPOSITORY.glob("examples/*.ipynb")]):
        files.append(File.generated(config, str(linked.relative_to(REPOSITORY)), abs_src_path=str(linked)))
    return files


def on_page_markdown(markdown, page, **_):
    """Turn a page's links out of docs/."""
    return _on_the_site(markdown, "docs")


def _on_the_site(text, folder):
    """A text of a folder of the repository, whose links lead where their files are on the site."""

    def place(link):
        target = posixpath.normpath(posixpath.join(folder, link[0])).removeprefix("docs/")
        return PAGES.get(target, target)

    return LINK.sub(place, text)
