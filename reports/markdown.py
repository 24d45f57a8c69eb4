"""Markdown."""

from settings.cli import printable


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [[cell(text) for text in row] for row in [head, ["---"] * len(head), *body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that can end neither its cell nor its row, and is no HTML."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
