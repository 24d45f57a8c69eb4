"""Random numbers that are functions of what they are for, not of a generator's history."""

import numpy as np
import torch


def seed_of(*keys: int) -> int:
    """A 63-bit seed from any number of non-negative integers, e.g. (seed, epoch, image)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def generator(*keys: int) -> torch.Generator:
    """A generator seeded with `keys`."""
    return torch.Generator().manual_seed(seed_of(*keys))
