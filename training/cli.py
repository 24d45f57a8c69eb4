"""What the three scripts share on the command line: plain sentences instead of tracebacks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.utilities.exceptions import MisconfigurationException


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's error into one sentence and exit status 1.

    Set HYDRA_FULL_ERROR=1, Hydra's own switch, to see tracebacks.
    """
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        text = str(error).strip()
        if "Original Traceback" in text:  # raised in a loader's worker: the sentence comes last
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"error: {text}")
