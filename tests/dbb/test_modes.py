"""The three ways to train a block: what they compute, keep, compile to, and share.

Random ones are in test_properties.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dbb import BRANCHES, MODES, Branch, DiverseBranchBlock, ReparamConv2d, branchwise, modes
from dbb.geometry import Lattice
from tests.dbb.blocks import CHANNELS, SHAPES, examples, geometry_id, make
from tests.dbb.reference import check_training, reference
from tests.helpers import relative_error

EVERY = pytest.mark.parametrize(("mode", "channels"), list(itertools.product(MODES, SHAPES.values())),
                                ids=[f"{mode}-{shape}" for mode in MODES for shape in SHAPES])


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize(("kernel_size", "stride", "channels"),
                         list(itertools.product([2, 3, (3, 5)], [1, 2], CHANNELS)), ids=geometry_id)
def test_online_over_all_positions_is_exact(kernel_size, stride, channels, monkeypatch):
    """The lattice of stride 1, which `online` itself would leave to `exact`."""
    monkeypatch.setitem(modes.MODES, "online", modes.merged_online)
    block, x = make("online", channels, kernel_size=kernel_size, stride=stride)
    block.positions = 10_000
    check_training(block, x)


@pytest.mark.parametrize("names", [("kxk", "own row"), ("own row", "kxk"), ("own row", "1x1_kxk", "kxk")])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "online"])
def test_a_branch_of_ones_own_with_a_smaller_kernel(mode, groups, names, monkeypatch):
    monkeypatch.setitem(BRANCHES, "own row", None)  # so that it is taken out again

    class OwnRow(Branch, name="own row"):
        def __init__(self, geometry, device=None, dtype=None):
            super().__init__(geometry, device, dtype)
            self.weight = self.new_kernel((1, geometry.kernel_size[1]))

        def kernel(self, first=None):
            return self.weight

    monkeypatch.setitem(modes.MODES, "online", modes.merged_online)
    block = ReparamConv2d(4, 6, (3, 5), padding=(1, 2), groups=groups, branches=names, mode=mode,
                          positions=10_000, dtype=torch.float64).train()
    plain = copy.deepcopy(block)
    x = torch.randn(4, 4, 12, 12, dtype=torch.float64)
    expected = 0
    for name in names:
        branch = plain.branches[name]
        if name == "1x1_kxk":
            u = F.conv2d(x, branch.inner(), groups=groups)
            u = u / (u.var((0, 2, 3), correction=0, keepdim=True) + branch.scale.eps).sqrt()
            z = F.conv2d(u, branch.second, padding=(1, 2), groups=groups)
        else:
            z = F.conv2d(x, branch.weight, padding=(branch.weight.shape[2] // 2, 2), groups=groups)
        expected = expected + branch.bn(z)
    y = block(x)
    assert relative_error(y, expected) < 1e-12
    y.square().mean().backward()
    expected.square().mean().backward()
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        if ours.ndim == 4:
            assert relative_error(ours.grad, theirs.grad) < 1e-10


def test_online_leaves_small_maps_to_exact():
    block, x = make("online", images=4)
    block.positions = 4 * 9 * 8
    assert torch.equal(block(x), copy.deepcopy(block).requires_grad_()(x))
    exact = copy.deepcopy(block)
    exact.mode = "exact"
    assert torch.equal(block(x), exact(x))
    block.positions -= 1
    assert not torch.equal(block(x), exact(x))


@examples(300)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(4, 2000))
def test_lattice(images, height, width, budget):
    lattice = Lattice.within(images, height, width, budget)
    n = len(range(0, images, lattice.images))
    counts = [count for _, _, count in lattice.places]
    assert lattice.of(torch.zeros(images, 1, height, width)).shape == (n, 1, *counts)
    for size, (first, step, count) in zip((height, width), lattice.places, strict=True):
        assert 0 <= first <= first + (count - 1) * step < size
        assert abs(first - (size - 1 - first - (count - 1) * step)) <= 1, "in the middle"
    rows, columns = counts
    n *= rows * columns
    assert n >= min(budget, images * height * width)
    assert n <= max(4 * budget, 4 * len(range(0, images, lattice.images))), "no more than rounding up takes"


@EVERY
def test_training_and_conversion(mode, channels):
    block, x = make(mode, channels)
    check_training(block, x, None if mode != "online" else
                   lambda z: Lattice.within(len(z), *z.shape[2:], block.positions).of(z))
    x = x.detach()
    with torch.no_grad(), branchwise(block.eval()):
        expected = block(x)
    assert relative_error(block(x), expected) < 1e-12
    assert relative_error(block.fuse()(x), expected) < 1e-12
    block.switch_to_deploy()
    assert relative_error(block(x), expected) < 1e-12
    assert not list(block.named_parameters())[2:], "a deployed block is a kernel and a bias"


def test_exact_and_online_share_everything_but_the_training_step():
    exact, x = make("exact")
    online = make("online")[0]
    online.load_state_dict(exact.state_dict())
    assert torch.equal(online.eval()(x), exact.eval()(x))
    assert torch.equal(online.fuse().weight, exact.fuse().weight)
    with pytest.raises(RuntimeError, match="factor"):
        make("linear")[0].load_state_dict(exact.state_dict())


@EVERY
def test_one_value_has_no_variance(mode, channels):
    for branches in (("kxk",), ("kxk", "1x1_kxk"), ("kxk", "1x1")):
        block, x = make(mode, channels, branches=branches)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(x[:1, :, :1, :1])


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode='onlin'.*exact, online, linear"):
        ReparamConv2d(4, 4, 3, mode="onlin")
    for training in (True, False):
        with pytest.raises(ValueError, match="expected 4D input"):
            ReparamConv2d(4, 4, 3).train(training)(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="positions=3"):
        ReparamConv2d(4, 4, 3, mode="online", positions=3)


@EVERY
def test_frozen_norms_are_the_merged_convolution(mode, channels):
    block, x = make(mode, channels)
    for norm in block.norms():
        norm.eval()
    before = copy.deepcopy(block.state_dict())
    y = block(x)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    with torch.no_grad():
        assert relative_error(y, reference(block.eval(), x)[0]) < 1e-12


def test_linear_starts_as_orepa():
    """Factors and kernels of the authors' code: kaiming_uniform_ with a=0, its bound sqrt(6 / fan_in)."""
    torch.manual_seed(0)
    names = ("kxk", "1x1_avg", "1x1_prior", "1x1_kxk", "1x1", "dw_1x1")
    block = ReparamConv2d(16, 16, 3, padding=1, branches=names, mode="linear")
    assert {name: gamma[0].item() for name, gamma in block.gammas().items()} == {
        "kxk": 0.25, "1x1_avg": 0.25, "1x1_prior": 0.0, "1x1_kxk": 0.5, "1x1": 1.0, "dw_1x1": 0.5}
    b = block.branches
    for name, weight in (("kxk", b["kxk"].weight), ("1x1", b["1x1"].weight),
                         ("second", b["1x1_kxk"].second), ("dw", b["dw_1x1"].first)):
        assert 0.9 < float(weight.detach().abs().max()) / (6 / weight[0].numel()) ** 0.5 <= 1, name
    assert not b["1x1_kxk"].first.any(), "the identity"
    assert sum(isinstance(module, nn.BatchNorm2d) for module in block.modules()) == 1
    block.single_init()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = block.bn(nn.functional.conv2d(x, b["kxk"].weight, padding=1))
        assert relative_error(block(x), expected) < 1e-5


@EVERY
def test_autocast_takes_statistics_in_float32(mode, channels):
    block, x = make(mode, channels, torch.float32)
    x.requires_grad_()
    full, y = copy.deepcopy(block), None
    expected = full(x)
    grads = torch.autograd.grad(expected, [x, *full.parameters()], expected.detach())
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    actual = torch.autograd.grad(y, [x, *block.parameters()], y.detach())
    assert relative_error(y, expected) < 3e-2
    assert relative_error(flat(actual), flat(grads)) < 0.1
    ours = {"exact": "scale.running_var", "online": "running_",
            "linear": "nothing: its norm runs on the bf16 map"}[mode]
    for name, value in full.state_dict().items():
        if ours in name:
            assert relative_error(block.state_dict()[name], value) < 1e-5, name


@EVERY
def test_channels_last(mode, channels):
    block, x = make(mode, channels, torch.float32)
    expected = copy.deepcopy(block)(x)
    y = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) < 1e-4
    assert block(x).is_contiguous(), "kernels in another format do not turn the map"


class Turned(TorchDispatchMode):
    """The operators whose maps `[N, *, H, W]` are not in channels_last."""

    def __init__(self, images):
        super().__init__()
        self.images, self.names = images, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        maps = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.ndim == 4
                and len(t) == self.images and t.shape[2:] in {(9, 8), (5, 4)}
                and t.nbytes == t.untyped_storage().nbytes()]  # and no part of a larger one
        if not all(t.is_contiguous(memory_format=torch.channels_last) for t in maps):
            self.names.append(func.overloadpacket.__name__)
        return out


@EVERY
@pytest.mark.parametrize("stride", [1, 2])
def test_no_map_leaves_channels_last(mode, channels, stride):
    """On a GPU every such map is copied by the next convolution or norm."""
    branches = ("kxk", "1x1", "1x1_avg", "1x1_kxk")
    block, x = make(mode, channels, torch.float32, stride=stride, branches=branches)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with Turned(len(x)) as turned:
        y = block.to(memory_format=torch.channels_last)(x)
        y.backward(y.detach())
    assert y.shape[2:] == ((9, 8) if stride == 1 else (5, 4))
    assert turned.names == []


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "channels"), [
    *((mode, SHAPES["dense"]) for mode in MODES), ("exact", SHAPES["depthwise"])], ids=geometry_id)
def test_compiles_once_without_a_break(mode, channels):
    block, x = make(mode, channels, branches=("kxk", "1x1", "1x1_avg", "1x1_kxk"))
    # Behind another layer: dynamo traces backward otherwise where the input needs a gradient.
    block = nn.Sequential(nn.Conv2d(x.shape[1], x.shape[1], 1).double(), block)
    expected = copy.deepcopy(block)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for batch in (x, 2 * x, x + 1):
        y, z = compiled(batch), expected(batch)
        assert relative_error(y, z) < 1e-12
    grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    wanted = torch.autograd.grad(z.square().sum(), list(expected.parameters()))
    assert relative_error(flat(grads), flat(wanted)) < 1e-10
    assert counter.frame_count == 1
    for n in (4, 3):  # the last batch of an epoch, and one more
        assert relative_error(compiled(x[:n]), expected(x[:n])) < 1e-12
    assert counter.frame_count <= 3


@EVERY
def test_unusual_tensors(mode, channels):
    """Each was once a crash or a NaN: float64 under autocast, one channel channels_last, half precision."""
    block, x = make(mode, channels, branches=("kxk", "1x1", "1x1_avg", "1x1_kxk"))
    expected = copy.deepcopy(block)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(copy.deepcopy(block)(x), expected) < (1e-12 if mode != "linear" else 1e-2)
    one, _ = make(mode, (3, 1, 1), branches=("kxk", "1x1_kxk"))
    turned = x[:, :3].contiguous(memory_format=torch.channels_last)
    one(turned).sum().backward()
    one.zero_grad()
    one.to(memory_format=torch.channels_last)(turned).sum().backward()
    half = block.half()
    y = half((x * 100).half().requires_grad_())
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@EVERY
def test_gradient_checkpointing_and_accumulation(mode, channels):
    block, x = make(mode, channels)
    parameters = list(block.parameters())
    expected = [torch.autograd.grad(block(part).square().sum(), parameters) for part in (x, x + 1)]
    for part in (x, x + 1):
        checkpoint(block, part, use_reentrant=False).square().sum().backward()
    for p, first, second in zip(parameters, *expected, strict=True):
        assert relative_error(p.grad, first + second) < 1e-10 or float((first + second).norm()) < 1e-9


@pytest.mark.parametrize(("mode", "groups", "maps"), [
    ("exact", 1, 4),  # the input and the maps that two KxK kernels and the average make
    ("exact", 64, 1), ("online", 1, 1), ("online", 64, 1), ("linear", 1, 2), ("linear", 64, 2)])
def test_what_forward_keeps(mode, groups, maps):
    """In maps of the input's size, kernels and statistics (much smaller here) not counted."""
    block = DiverseBranchBlock(64, 64, 3, padding=1, groups=groups, mode=mode, positions=256)
    x, storages = torch.randn(16, 64, 32, 32, requires_grad=True), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    assert sum(size // x.nbytes for size in storages.values()) == maps


@EVERY
def test_double_backward(mode, channels):
    """A hand-written backward is itself differentiable."""
    block, x = make(mode, channels, branches=("kxk", "1x1", "1x1_avg", "1x1_kxk"), images=3)
    names, parameters = zip(*block.named_parameters(), strict=True)
    block.positions = 16

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), x)

    inputs = (x[:, :, :5, :4].clone().requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_each_norm_has_an_epsilon_and_a_momentum_of_its_own(mode):
    block, x = make(mode)
    for number, branch in enumerate(block.branches.values(), 1):
        branch.bn.eps, branch.bn.momentum = 0.1 * number, 0.05 * number
        if branch.scale is not None:
            branch.scale.eps = 0.02 * number
    check_training(block, x, None if mode != "online" else
                   lambda z: Lattice.within(len(z), *z.shape[2:], block.positions).of(z))
