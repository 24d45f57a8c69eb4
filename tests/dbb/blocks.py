"""Blocks that the tests of this package look at: on a grid of shapes, and random ones."""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dbb import ReparamConv2d
from dbb.geometry import Lattice
from tests.helpers import randomize

ALL = ("kxk", "1x1", "1x1_kxk", "1x1_avg", "avg", "1xk", "kx1", "identity")
# in, out, groups: dense, dense, grouped, depthwise, depthwise with a multiplier
CHANNELS = [(8, 8, 1), (6, 10, 1), (8, 12, 4), (8, 8, 8), (4, 8, 4)]
SHAPES = {"dense": (8, 8, 1), "depthwise": (8, 8, 8)}
NAMES = ("kxk", "1x1", "1xk", "kx1", "identity", "avg", "1x1_kxk", "1x1_avg", "1x1_prior", "dw_1x1",
         "1x1_kxk_1x1")
MODES = ("exact", "online", "linear")
FUZZ = "FUZZ" in os.environ


def geometry_id(value):
    return str(value).replace(" ", "")


def make(mode, channels=SHAPES["dense"], dtype=torch.float64, kernel_size=3, stride=1, branches=NAMES,
         images=6):
    torch.manual_seed(0)
    c_in, c_out, groups = channels
    block = ReparamConv2d(c_in, c_out, kernel_size, stride, 1, groups=groups, branches=branches, mode=mode,
                          positions=64, dtype=dtype)
    return randomize(block).train(), torch.randn(images, c_in, 9, 8, dtype=dtype)


def examples(count):
    """The same cases in every run of the tests; with FUZZ=COUNT, new ones."""
    return settings(max_examples=int(os.environ.get("FUZZ", count)), derandomize=not FUZZ, database=None,
                    deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw, largest=11, extra=3):
    """Arguments of a block, and the height and width of an image that it takes."""
    def pair(first, last):
        return st.tuples(*[st.integers(first, last)] * 2)

    kernel_size, dilation = draw(pair(1, largest)), draw(pair(1, 3))
    groups = draw(st.integers(1, 4))
    padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 3), pair(0, 6)))
    stride = 1 if padding == "same" else draw(pair(1, 3))
    branches = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
    if not {"kxk", "1x1_kxk", "1x1_avg"} & set(branches):
        branches.append(draw(st.sampled_from(["kxk", "1x1_kxk", "1x1_avg"])))
    in_channels, out_channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    arguments = dict(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size,
                     stride=stride, padding=padding, dilation=dilation, groups=groups,
                     branches=branches, padding_mode=padding_mode, mode=draw(st.sampled_from(MODES)))
    size, paddings = [], padding if isinstance(padding, tuple) else (padding, padding)
    for k, d, p in zip(kernel_size, dilation, paddings, strict=True):
        pixels = {"same": d * (k - 1), "valid": 0}.get(p) if isinstance(p, str) else 2 * p
        # No smaller than one window, and than what reflecting and wrapping need.
        size.append(max(d * (k - 1) + 1 - pixels, (pixels + 1) // 2 + 1) + draw(st.integers(0, extra)))
    return arguments, size


def build(case, seed=0, dtype=torch.float64, images=4):
    arguments, size = case
    torch.manual_seed(seed)
    block = randomize(ReparamConv2d(**({"positions": 16} | arguments), dtype=dtype), seed)
    return block, torch.randn(images, arguments["in_channels"], *size, dtype=dtype)


def sample_of(block, x):
    """Where an online block takes its statistics from, as a function from a map to some of its positions."""
    positions = block.geometry.positions(block.geometry.pad(x))

    def sample(z):
        if len(x) * positions[0] * positions[1] <= block.positions:
            return z
        lattice = Lattice.within(len(z), *z.shape[2:], block.positions)
        rows, columns = ([first + i * step for i in range(count)] for first, step, count in lattice.places)
        images = range(0, len(z), lattice.images)
        sampled = torch.stack([z[n, :, r, c] for n in images for r in rows for c in columns])
        return sampled[:, :, None, None]
    return sample
