"""What the scripts share on the command line: plain sentences instead of tracebacks, and output folders."""

import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

# A CUDA toolkit on a machine without a GPU; torch.utils.benchmark imports the module that says so.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# "GPU available: False", advertisements, "`Trainer.fit` stopped": train.py prints what matters of it.
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
# Lightning calls a function that torch has renamed.
warnings.filterwarnings("ignore", ".*LeafSpec")
# A run that goes on writes where it wrote before.
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
# Our sampler starts where the run was saved.
warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

SMALL = 2**16  # bytes of a file of settings of other libraries
MACHINE = {  # what a machine can cause, by what libraries then say, in errors of many types
    r"No space left|quota exceeded|PytorchStreamWriter|inline_container":
        "the disk, or your share of it, is full: make room, and try again; a run goes on by "
        "ckpt=FOLDER/checkpoints/last.ckpt",
    r"DefaultCPUAllocator|bad_alloc|CUDA out of memory|MemoryError":
        "there is not enough memory: lower data.batch_size or data.image_size; a run goes on by "
        "ckpt=FOLDER/checkpoints/last.ckpt, with another batch size from the end of an epoch",
    r"File too large":
        "a file would be larger than is allowed here (ulimit -f): allow more, and try again; a run goes on "
        "by ckpt=FOLDER/checkpoints/last.ckpt",
    r"\[Errno (1|13|30)\]":
        "this user may not write there: change that, or choose another folder with out=DIR",
    r"Connection (closed|reset) by peer|remote process exited":
        "another process of this run has ended, for what it says itself: the run goes on by "
        "ckpt=FOLDER/checkpoints/last.ckpt",
    r"DataLoader worker .*(killed|exited)":
        "a process that loads images has died, mostly for want of memory: lower data.num_workers or "
        "data.batch_size; the run goes on by ckpt=FOLDER/checkpoints/last.ckpt",
}


def of_lightning(name: str) -> tuple[type[Exception], ...]:
    """An exception of Lightning's by its name; none where Lightning, slow to import, raised nothing yet."""
    module = sys.modules.get("pytorch_lightning.utilities.exceptions")
    return (getattr(module, name),) if module else ()


def is_expected(error: Exception) -> bool:
    """Whether a user, a file or a disk can cause the error."""
    return isinstance(error, (ValueError, OSError, *of_lightning("MisconfigurationException")))


def of_the_machine(error: Exception) -> str | None:
    """What to do about a failure of the machine, if the error is one."""
    if "make room" in str(error):  # which says it already
        return None
    return next((advice for words, advice in MACHINE.items() if re.search(words, _text(error))), None)


def _text(error: Exception) -> str:
    return str(error).strip() or type(error).__name__  # Python's MemoryError says nothing more


def as_sentence(error: Exception) -> str:
    """An error in one sentence; its kind is named where it is none that a user can cause."""
    advice = of_the_machine(error)
    if advice is not None:
        return f"error: {advice} ({printable(_text(error).splitlines()[0])})"
    if not is_expected(error):
        return f"error: {type(error).__name__}: {printable(str(error))}"
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a loader's worker: the sentence comes last
        text = text.splitlines()[-1].removeprefix("ValueError: ")
    first, *more = map(printable, f"error: {text}".splitlines())
    return "\n  ".join([first, *map(str.strip, more)])  # no line of a file's looks like one of ours


def print_failure(name: str, error: Exception) -> None:
    """Say why a job failed, with a traceback where that may be a fault of ours."""
    if not is_expected(error) and of_the_machine(error) is None:
        traceback.print_exception(error)
    print(f"{name}: {as_sentence(error)}", file=sys.stderr)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's error into one sentence and exit status 1.

    Set HYDRA_FULL_ERROR=1, Hydra's own switch, to see tracebacks.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # perhaps of ASCII alone, and names of classes are of any signs
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except of_lightning("SIGTERMException"):  # which alone would exit with status 0
        sys.exit(143)
    except Exception as error:
        expected = is_expected(error) or of_the_machine(error) is not None
        if not expected or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(as_sentence(error))


def printable(text: str) -> str:
    """Text of a file, harmless on a terminal: a newline or an escape sequence is shown, not followed."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def typed(knob: str, value: object) -> str:
    """`knob=value` as it is typed, in the quotes that the shell and Hydra need."""
    if re.fullmatch(r"[\w./+~-]+", str(value)):
        return f"{knob}={value}"
    # Of Hydra's quoted values: a backslash escapes quotes, and backslashes in front of one.
    value = re.sub(r"(\\*)'", r"\1\1\\'", printable(str(value)))
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return '"' + re.sub(r'(["$`\\])', r"\\\1", f"{knob}='{value}'") + '"'


def output_folder(path: str | Path) -> Path:
    """Make a folder to write into.

    Raises:
        ValueError: if it cannot be made or written into.
    """
    try:
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError) as error:  # the latter of ~somebody whom this machine does not know
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"out: cannot write into {path} ({why}): choose another folder") from error


def refuse_matplotlibrc() -> None:
    """Refuse what matplotlib, which other libraries import, would read without end in the current folder.

    Raises:
        ValueError: if a matplotlibrc is there that is no short text.
    """
    path = Path("matplotlibrc")
    if not path.exists():
        return
    try:
        if not path.is_file() or path.stat().st_size > SMALL:
            raise ValueError("it is no small file")
        path.read_text("utf-8")
    except ValueError as error:
        raise ValueError(f"matplotlibrc in this folder, which matplotlib would read, is no short text "
                         f"({error}): start this in another folder") from error
