"""Markdown."""

import re

from settings.cli import printable


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [[cell(text) for text in row] for row in [head, ["---"] * len(head), *body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that can end neither its cell nor its row, and is no HTML, link or picture."""
    plain = re.sub(r"([\\\[\]`!|])", r"\\\1", printable(text))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;")
    # What GitHub makes a link of without any marks, an address, has a comment in it, which is not shown.
    return re.sub(r"(:(?=//)|www(?=\.)|@)", r"\1<!-- -->", plain, flags=re.IGNORECASE)
