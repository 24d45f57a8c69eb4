"""Rules about the code itself."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

LIBRARY = sorted(Path(ROOT, "dbb").glob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_dbb_imports_torch_and_nothing_else(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in {"dbb", "torch", *sys.stdlib_module_names}, name


def test_the_hashed_lock_has_the_same_versions():
    lock, hashed = (Path(ROOT, f"requirements.{name}").read_text() for name in ("lock", "hashes.txt"))
    entries = hashed.replace(" \\\n", "").splitlines()
    normal = lock.lower().replace("_", "-").split()  # as names of packages are compared
    assert sorted(entry.split(" ")[0] for entry in entries) == sorted(normal)
    assert all("--hash=sha256:" in entry for entry in entries)
