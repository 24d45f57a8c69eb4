"""Lines for whoever started a run."""


def say(text: str) -> None:
    """Print in the first of several processes. Lightning knows which that is; it takes seconds to import."""
    from pytorch_lightning.utilities import rank_zero_only
    rank_zero_only(print)(shown(text))


def shown(text: str) -> str:
    """Text that may be a file's, harmless on a terminal: a newline or an escape is shown, not followed."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
