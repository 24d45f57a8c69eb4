"""What the scripts share on the command line: plain sentences instead of tracebacks, and output folders."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

# A CUDA toolkit on a machine without a GPU; torch.utils.benchmark imports the module that says so.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# "GPU available: False", advertisements, "`Trainer.fit` stopped": train.py prints what matters of it.
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
# Lightning calls a function that torch has renamed.
warnings.filterwarnings("ignore", ".*LeafSpec")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's error into one sentence and exit status 1.

    Set HYDRA_FULL_ERROR=1, Hydra's own switch, to see tracebacks.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SIGTERMException:  # which alone would exit with status 0
        sys.exit(143)
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        text = str(error).strip()
        if "Original Traceback" in text:  # raised in a loader's worker: the sentence comes last
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"error: {text}")


def output_folder(path: str | Path) -> Path:
    """Make a folder to write into.

    Raises:
        ValueError: if it cannot be made or written into.
    """
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"out: cannot write into {path} ({error.strerror}): choose another "
                         "folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a process that is killed leaves no half of one."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)
