"""Keeps ``docs/errors.md`` in step with the code: every message that it raises or warns of is there, and no other.

    python docs/error_page.py

reads the messages out of the sources, adds what the page lacks, drops what the code no longer says, and sorts. The
remedies are written by hand, in the page: what stands under a message stays with it. A message that says itself what
to do needs none; ``speaks_for_itself`` is where that line is drawn, and ``tests/test_docs.py`` holds the page to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "errors.md"
GAP = "…"
ERRORS = re.compile(r"(Error|Exception)$")
WARNINGS = {"warn", "warning", "warning_once"}
# A section's rooms: the files whose messages it holds. A section without them is written by hand throughout.
ROOMS = re.compile(r"^<!-- rooms: (.*?) -->$", re.MULTILINE)
OTHERS = "## Others"
ENTRY = re.compile(r"^- `([^`]*)`\n((?:\n    .*\n|    .*\n)*)", re.MULTILINE)


def speaks_for_itself(message: str) -> bool:
    """Whether a message says what to do: more than one clause, what is allowed, or what is needed."""
    says = r"[;:.] (?!…)\w|, or \w|[Aa]llowed|[Kk]nown|must\b|need|give\b|belong|pip install|at least|Did you mean"
    return re.search(says, message) is not None


def constants(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Strings with names of their own, such as the names of files, where all rooms mean the same by a name."""
    found: dict[str, set[str]] = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = node.value.value if isinstance(node.value, ast.Constant) else None
                found.setdefault(node.targets[0].id, set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1 and _all_strings(values)}


def _all_strings(values: set) -> bool:
    return all(isinstance(value, str) for value in values)


def text_of(node: ast.expr, names: dict[str, str]) -> str:
    """What an expression says, with a gap for every part that is known only when it happens."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, names) if isinstance(node.value, (ast.Name, ast.IfExp)) else GAP
    if isinstance(node, ast.Name):
        return names.get(node.id, GAP)
    if isinstance(node, ast.IfExp) and getattr(node.orelse, "value", None) == "":  # said only where it is known
        return text_of(node.body, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names) + text_of(node.right, names)
    return GAP


def messages_of(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """The messages of one room."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        callee = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        warns = callee in WARNINGS and isinstance(call.func, ast.Attribute)
        if not (ERRORS.search(callee) or warns or callee == "print"):
            continue
        said, known = [call.args[0]], names
        maker = functions.get(getattr(getattr(said[0], "func", None), "id", None))
        if maker:  # a function of this room puts the words together
            given = zip(maker.args.args, said[0].args)
            known = {**names, **{parameter.arg: text_of(value, names) for parameter, value in given}}
            said = [node.value for node in ast.walk(maker) if isinstance(node, ast.Return) and node.value]
        for expression in said:
            text = " ".join(text_of(expression, known).split())
            text = re.sub(f"{GAP}+", GAP, text).replace("`", "")
            if re.search(r"\w", text) and (callee != "print" or text.startswith("WARNING")):
                yield text


def messages() -> dict[str, list[str]]:
    """Every message, by the room that says it."""
    files = sorted(REPOSITORY.glob("*.py"))
    trees = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    names = constants(trees)
    return {room: sorted(set(messages_of(tree, names))) for room, tree in trees.items()}


def alphabetical(message: str) -> str:
    """What a message is sorted by: its own words, not what comes in between."""
    return re.sub(r"[^a-z0-9 ]", "", message.lower()).strip()


def sections(page: str) -> list[tuple[str, str]]:
    """The page cut at its second-level headings: heading (the first has none) and what stands under it."""
    parts = re.split(r"^(## .*)$", page, flags=re.MULTILINE)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2])]


def renewed(page: str) -> str:
    """The page as it should be, with the remedies that it has."""
    said, seen = messages(), set()
    remedies = {message: remedy.strip() for message, remedy in ENTRY.findall(page)}
    cut = sections(page)
    placed = {room for _, body in cut for rooms in ROOMS.findall(body) for room in rooms.split()}
    left = [room for room, found in said.items() if found and room not in placed]
    if left:
        cut.append((OTHERS, f"\n\n<!-- rooms: {' '.join(left)} -->\n"))
    whole = ""
    for heading, body in cut:
        rooms = ROOMS.search(body)
        if rooms:
            found = {text for room in rooms[1].split() for text in said.get(room, ())} - seen
            seen |= found
            opening = body[: rooms.end()].rstrip("\n")
            body = opening + "\n\n"
            for message in sorted(found, key=lambda text: (alphabetical(text), text)):
                remedy = remedies.get(message)
                body += f"- `{message}`\n\n" + (f"    {remedy}\n\n" if remedy else "")
        whole += heading + body
    return whole.rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
