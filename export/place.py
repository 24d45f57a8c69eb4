"""Where convert.py writes: files take their places when all are written, and none that is somebody else's."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from export.files import HUB, read_report, sha256
from export.formats import FORMATS
from models.say import say

REPORT, FAILED = "report.json", "report-failed.json"
REPORTS = ("report.md", "report.png", REPORT)
GRAPHS = "graphs.png"  # where both graphs were exported
KNOWN = {*(kind.file for kind in FORMATS.values()), *HUB, *REPORTS, GRAPHS}  # all that a conversion may write


def _reported(path: Path) -> tuple[set[str], str | None] | None:
    """Which files a conversion wrote, and of which checkpoint, by its report; None if that is not ours."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        report = read_report(path)
        about, _ = report["about"], report["relative_error"]  # which no other tool's report has
        graphs = [GRAPHS] if "graphs" in report else []
        written = {*report["files"], *report.get("hub", []), *REPORTS, *graphs} & KNOWN
        return written, about.get("checkpoint_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def written_before(out: Path) -> set[str]:
    """The files in `out` that an earlier conversion wrote, as its report says."""
    written, _ = _reported(out / REPORT) or (set(), None)
    if _reported(out / FAILED) is not None:
        written |= {FAILED}
    return {name for name in written if not (out / name).parent.is_symlink() or "/" not in name}


def refuse_anothers(out: Path, ckpt: Path) -> None:
    """Refuse a folder, chosen by a checkpoint's name, that has the conversion of another of that name.

    Raises:
        ValueError: if so.
    """
    _, converted = _reported(out / REPORT) or (None, None)
    if converted is not None and ckpt.is_file() and converted != sha256(ckpt):
        raise ValueError(f"{out} has the files of another checkpoint that is called {ckpt.name}: say "
                         "with out=DIR where to write, or remove that folder")


def require_place(out: Path, names: Sequence[str]) -> None:
    """Check, before any work, that files of an earlier conversion alone will be replaced.

    Raises:
        ValueError: if something else stands in a file's place.
    """
    for name in {*names, *REPORTS, FAILED} - written_before(out):
        parent = (out / name).parent
        if (out / name).exists() or parent != out and (parent.is_file() or parent.is_symlink()):  # hub/
            raise ValueError(f"{out / name} is to be written, but what stands there is of no earlier "
                             "conversion: choose another folder with out=DIR")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder for the files of a conversion; they replace an earlier one's in `out` when all are written."""
    umask = os.umask(0)
    os.umask(umask)
    mine = f".part-{platform.node()}+"  # a sign that no host's name has
    for left in out.glob(f"{mine}*"):
        if not _runs(left.name.removeprefix(mine)):  # of a conversion that was killed
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{mine}{os.getpid()}-") as part:
        yield Path(part)
        files = [path for path in Path(part).rglob("*") if path.is_file()]
        names = {str(path.relative_to(part)) for path in files}
        before = written_before(out)
        ours, theirs = (_reported(folder / REPORT) for folder in (Path(part), out))
        if ours and theirs and ours[1] != theirs[1]:
            say(f"{out} had the conversion of another checkpoint, or of an earlier state: it is replaced")
        gone = sorted(name for name in before - names if os.path.lexists(out / name))
        for name in gone:  # while the earlier report still says that they are ours
            (out / name).unlink()
        if gone := [name for name in gone if name != FAILED]:
            say(f"removed from {out}: {', '.join(gone)}, of the conversion before; a folder has the files of "
                "its last conversion alone, so name all formats in one command, or choose another out=DIR")
        for path in sorted(files, key=lambda path: path.name != REPORT):  # first: it says which are ours
            place = out / path.relative_to(part)
            place.parent.mkdir(exist_ok=True)
            path.chmod(0o666 & ~umask)  # safetensors writes for its owner only
            path.replace(place)


def _runs(name: str) -> bool:
    """Whether the process runs whose number stands before the dash."""
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # another user's
    return True
