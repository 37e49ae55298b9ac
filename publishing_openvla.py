"""Code files of a saved folder that fit each other, and pushing to the Hub.

transformers up to 5.5 caches the code of local folders under the folder's last name, and runs helper modules of the
first folder with the entry file of the second. So every code file carries the digest of all files that were saved with
it, and entry files raise where the digests of the loaded files differ.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin, logging

from .errors_openvla import OpenVLAImportError

logger = logging.get_logger(__name__)

REMOTE_CODE = "transformers_modules"  # the package into which transformers copies the code of a folder
FIRST_LINE = "from __future__ import annotations\n"  # of every code file; the digest is written behind it
MARK = "CODE_DIGEST"
MARKED = re.compile(rb'^from __future__ import annotations; CODE_DIGEST = "[0-9a-f]{64}"$', re.MULTILINE)


def require_same_code(module: str) -> None:
    """Raise ImportError unless the loaded code of an entry file's saved folder was saved together with it."""
    package, _, entry = module.rpartition(".")
    if package.partition(".")[0] != REMOTE_CODE:
        return
    digest = getattr(sys.modules[module], MARK, None)
    loaded = [name for name in sys.modules if name.startswith(f"{package}.") and name.endswith("_openvla")]
    others = sorted(name for name in loaded if getattr(sys.modules[name], MARK, None) != digest)
    if others:
        files = ", ".join(f"{name.rpartition('.')[2]}.py" for name in others)
        raise OpenVLAImportError(
            f"The code files do not fit each other: {files} were not saved with {entry}.py. If they are of another "
            f"folder of the same name ({package.rpartition('.')[2]}) that this process has loaded, load this one in a "
            "new process, or rename it. If two versions of the package saved into this folder, make it one again: "
            "openvla upgrade FOLDER --in-place. Or `import openvla` first: the installed package serves every folder."
        )


def mark_code(folder: str | os.PathLike) -> None:
    """Write the digest of all files that are saved together into every code file of a saved folder.

    Files that differ from the running code, such as the user's, are not changed; a warning is logged for files of
    another version of the package. Code that comes from a saved folder carries its digest already.
    """
    if MARK in globals():
        return
    paths = sorted(Path(__file__).parent.glob("*_openvla.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in paths}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources.items()).encode()).hexdigest()
    line = f'{FIRST_LINE.rstrip()}; {MARK} = "{digest}"\n'
    other_versions = []
    for name, text in sources.items():
        saved = Path(folder) / name
        content = saved.read_bytes() if saved.is_file() else b""
        if MARKED.search(content) and digest.encode() not in content:
            other_versions.append(name)
        if content == text.encode():
            temporary = saved.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(text.replace(FIRST_LINE, line, 1).encode())
            os.replace(temporary, saved)
    if other_versions:
        logger.warning_once(
            f"{folder} holds code of another version of this package ({', '.join(other_versions)}) beside what was "
            "saved now: with trust_remote_code it will not load. Make it one again: openvla upgrade FOLDER --in-place."
        )


class PushToHub(PushToHubMixin):
    """Mixin of models and processors: ``push_to_hub``, the same on every transformers version."""

    # openvla.conversion.hub_upload.push_to_hub; None without the package, for transformers' own
    hub_uploader: ClassVar[Callable[..., Any] | None] = None

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and upload in one commit; arguments and errors are those of ``hub_uploader``."""
        return (super().push_to_hub if self.hub_uploader is None else self.hub_uploader)(*args, **kwargs)
