"""Lines for whoever started a run."""


def say(text: str) -> None:
    """Print in the first of several processes. Lightning knows which that is; it takes seconds to import."""
    from pytorch_lightning.utilities import rank_zero_only
    rank_zero_only(print)(text)
