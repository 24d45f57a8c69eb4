"""Lines for whoever started a run."""

from settings.cli import printable


def say(text: str) -> None:
    """Print in the first of several processes, harmlessly: the text may be a file's.

    Lightning knows which process that is; it takes seconds to import.
    """
    from pytorch_lightning.utilities import rank_zero_only
    rank_zero_only(print)(printable(text))
