"""Cases from public bug reports about neighbouring software: a block works where a plain convolution does."""

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from dbb import (
    MODES,
    AsymmetricConvBlock,
    DiverseBranchBlock,
    NothingSwappedError,
    OnlineReparamBlock,
    ReparamConv2d,
    branchwise,
    compare,
    fold_norms,
    reparameterize,
    replace_convs,
    restore_norms,
)
from tests.helpers import EVERY_BRANCH, pair, randomize, relative_error

pytestmark = pytest.mark.slow


class Same(nn.Conv2d):
    """Prepares its input as timm's Conv2dSame does."""

    def forward(self, x):
        assert self.weight.shape == (self.out_channels, 3, 3, 3)
        assert self.weight.device == x.device
        return F.conv2d(F.pad(x, [1] * 4), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """Computes its kernel."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Odd(nn.BatchNorm2d):
    """Does more than normalise."""

    def forward(self, x):
        return super().forward(x) + 1


def with_same() -> nn.Module:
    net = nn.Sequential(Same(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    return replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 8, 8))[0]


@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
def test_no_tensor_shares_memory_with_itself(mode):
    """DDP broadcasts into buffers, and averaging writes into them."""
    blocks = [with_same(), ReparamConv2d(8, 8, 3, padding=1, branches=EVERY_BRANCH, mode=mode),
              ReparamConv2d(8, 8, 3, padding=1, groups=8, branches=EVERY_BRANCH, mode=mode)]
    for block in blocks:
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            assert tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size(), name
            assert tensor.is_contiguous(), name


def test_averaging_a_subclass_of_conv2d():
    net = with_same()
    average = AveragedModel(net, use_buffers=True)
    for _ in range(2):
        net(torch.randn(2, 3, 8, 8))
        average.update_parameters(net)
    assert average.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_ddp_of_a_subclass_of_conv2d(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert DistributedDataParallel(with_same())(torch.randn(2, 3, 8, 8)).shape == (2, 8, 8, 8)
    finally:
        distributed.destroy_process_group()


def test_a_network_on_meta_is_swapped_as_one_with_values():
    net = nn.Sequential(Same(3, 8, 3), BatchNormAct2d(8), Standardised(8, 8, 3), nn.BatchNorm2d(8),
                        *pair()[:1], Odd(8))
    for conv in net[::2]:
        conv.half()  # and the norms in float32
    image = torch.zeros(1, 3, 12, 12).half()
    there, on_meta = (replace_convs(net.to(device), "dbb", example_input=image.to(device))[1]
                      for device in ("cpu", "meta"))
    assert there == on_meta
    assert [row.block is None for row in on_meta] == [False, True, True]
    block, _ = replace_convs(pair().to("meta"), "dbb", example_input=torch.zeros(1, 8, 9, 9, device="meta"))
    merged = reparameterize(block.eval())
    assert merged[0].weight.is_meta
    assert merged[0].bias.shape == (8,)


@pytest.mark.parametrize("block", [EVERY_BRANCH, "orepa"])
def test_a_network_filled_on_meta_can_be_moved(block):
    image = torch.zeros(1, 8, 9, 9)
    full, empty = (replace_convs(pair().to(device), block, example_input=image.to(device))[0].eval()
                   for device in ("cpu", "meta"))
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    expected = full.double()(x)
    assert relative_error(empty.double()(x), expected) < 1e-12
    assert relative_error(reparameterize(empty)(x), expected) < 1e-12
    assert empty[1].weight.device.type == "cpu"


@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
def test_a_default_device_that_is_not_the_networks(mode):
    """Nothing of ours is made on the default device; "meta" stands for a GPU beside a network on the CPU."""
    plain = nn.Sequential(Same(3, 8, 3, bias=False), BatchNormAct2d(8), *pair(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(4, 3, 12, 12)
    block = "orepa" if mode == "linear" else partial(DiverseBranchBlock, mode=mode, positions=16)
    with torch.device("meta"):
        net, report = replace_convs(plain, block, example_input=x)
        net(x).sum().backward()
    randomize(net.eval())
    with torch.device("meta"):
        folded = fold_norms(net, x[:1])
        restored = restore_norms(net, report, copy.deepcopy(plain), [x])
        assert compare(net, reparameterize(net), [x]).predictions_changed == 0
        assert compare(net, reparameterize(net), []).images == 0
    with torch.no_grad():
        assert relative_error(folded(x), net(x)) < 1e-5
        assert relative_error(restored.eval()(x), net(x)) < 1e-5


def test_a_passed_norm_is_where_a_file_puts_the_network():
    """For a host that folds pairs by itself: it asks the norm that is left for its values."""
    plain = randomize(pair())
    full, _ = replace_convs(plain, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    with torch.device("meta"):
        empty, _ = replace_convs(pair(), "dbb", example_input=torch.zeros(1, 8, 9, 9))
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in empty.buffers())
    assert torch.equal(empty[1].running_var, torch.ones(8))


@pytest.mark.parametrize("kind", [DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock])
@pytest.mark.parametrize("assign", [False, True])
def test_what_no_file_holds_is_made_anew(kind, assign):
    """Built on meta, as large networks are, and filled from a file."""
    torch.manual_seed(0)
    full = kind(8, 8, 3, padding=1).eval()
    full.init_gamma(1.0)
    with torch.device("meta"):
        empty = kind(8, 8, 3, padding=1)
        deployed = kind(8, 8, 3, padding=1, deploy=True)
    tensors = [*empty.state_dict().values(), *deployed.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    if not assign:
        empty = empty.to_empty(device="cpu")
        for tensor in tree_leaves(list(empty.buffers())):
            assert tensor.device.type == "cpu"
    empty.load_state_dict(full.state_dict(), assign=assign)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(empty.eval()(x), full(x))
    half = copy.deepcopy(full).half().float()
    assert relative_error(half(x), full(x)) < 1e-2


@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
@pytest.mark.parametrize("groups", [1, 8])
def test_an_empty_batch_is_what_it_is_to_a_norm(mode, groups):
    """Detection heads see them: no statistic moves but the count of batches, and every gradient is zero."""
    block = ReparamConv2d(8, 8, 3, 2, 1, groups=groups, branches=EVERY_BRANCH[:4], mode=mode)
    before = copy.deepcopy(block.state_dict())
    y = block(torch.zeros(0, 8, 10, 10))
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in block.parameters())
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key] + key.endswith("num_batches_tracked")), key
    assert block.eval()(torch.zeros(0, 8, 10, 10)).shape == (0, 8, 5, 5)


def _old_weight_norm(branch):
    with pytest.warns(FutureWarning):
        weight_norm(branch, "weight")


def _prune(branch):
    prune.l1_unstructured(branch, "weight", 0.5)


@pytest.mark.parametrize("hang", [_prune, _old_weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
def test_a_branch_whose_weight_is_computed(mode, hang: Callable):
    """Pruning and both weight norms, over steps of training: the block follows what is behind the weight."""
    torch.manual_seed(0)
    block = DiverseBranchBlock(8, 8, 3, padding=1, mode=mode, positions=16)
    branch = block.branches["kxk"]
    hang(branch)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = torch.randn(4, 8, 10, 10)
    for _ in range(2):
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()
    behind = [p for key, p in branch.named_parameters() if "bn" not in key and p.ndim == 4]
    assert behind
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in behind)
    merged = block.eval()(x)  # after a step, and without another forward in training
    with torch.no_grad():
        for p in behind:
            p.add_(1)
    assert relative_error(block(x), merged) > 1e-3


@pytest.mark.parametrize("kind", [DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_pruned_norm(kind, groups):
    """Network slimming prunes gammas, and moves what is behind them."""
    block, x = kind(8, 8, 3, padding=1, groups=groups), torch.randn(4, 8, 10, 10)
    block.init_gamma(1.0)
    for norm in block.norms():
        prune.l1_unstructured(norm, "weight", 0.5)
    for _ in range(2):
        block(x).square().mean().backward()
    before = block.eval()(x)
    with torch.no_grad():
        for norm in block.norms():
            norm.weight_orig.mul_(3)
    assert relative_error(block(x), before) > 0.5


@pytest.mark.parametrize("wrap", ["dataclass", "mapping", "object", "nested"])
def test_an_output_in_a_container_that_torch_does_not_know(wrap):
    @dataclass
    class Out:
        pre: torch.Tensor
        post: torch.Tensor

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = pair()

        def forward(self, x):
            pre = self.conv(x)
            parts = {"pre": pre, "post": self.norm(pre)}
            nested = SimpleNamespace(inner=UserDict(parts))
            nested.itself = nested
            return {"dataclass": Out(**parts), "mapping": UserDict(parts), "object": SimpleNamespace(**parts),
                    "nested": nested}[wrap]

    with pytest.raises(NothingSwappedError, match="also goes to what the network returns"):
        replace_convs(Both(), "dbb", example_input=torch.zeros(1, 8, 9, 9))


@pytest.mark.parametrize("kind", [DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock])
def test_every_module_resets_its_parameters(kind):
    """As code does that builds on meta: `to_empty`, then `reset_parameters` of all modules that have it."""
    with torch.device("meta"):
        block = kind(8, 8, 3, padding=1)
    block.to_empty(device="cpu")
    for tensor in [*block.parameters(), *block.buffers()]:
        tensor.data.fill_(3)
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(0)
    fresh = dict(kind(8, 8, 3, padding=1).state_dict())
    for key, value in block.state_dict().items():
        assert value.float().mean() == pytest.approx(fresh[key].float().mean().item(), abs=0.2), key
        if value.ndim == 4:
            assert value.std() == pytest.approx(fresh[key].std().item(), rel=0.3, abs=1e-9), key
        else:
            assert torch.equal(value, fresh[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_a_block_without_a_kernel_of_its_own_is_converted(mode):
    block = ReparamConv2d(8, 8, 3, padding=1, branches=["avg", "identity"], mode=mode, dtype=torch.float64)
    randomize(block).eval()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    with branchwise(block):
        assert relative_error(reparameterize(block)(x), block(x)) < 1e-12


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.zeros(8), nn.Parameter(torch.zeros(8))])
def test_what_a_block_computes_cannot_be_set(key, value):
    block = DiverseBranchBlock(8, 8, 3).eval()
    with pytest.raises(AttributeError, match=f"the {key} of a block is computed from its branches"):
        setattr(block, key, value)
    with pytest.raises(AttributeError, match="the weight of a block is computed from its branches"):
        fuse_conv_bn_eval(block, nn.BatchNorm2d(8).eval())


def test_inputs_by_name_and_their_errors():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pair()

        def forward(self, pixel_values=None, scale=None):
            return self.net(pixel_values) * scale["by"]

    x = torch.zeros(1, 8, 9, 9)
    _, report = replace_convs(ByName(), "dbb", example_input={"pixel_values": x, "scale": {"by": 2}})
    assert report[0].block
    folded = fold_norms(ByName().eval(), {"pixel_values": x, "scale": {"by": 2}})
    assert isinstance(folded.net[0].bias, nn.Parameter)
    plain = randomize(ByName()).eval()
    net, report = replace_convs(plain, "dbb", example_input={"pixel_values": x, "scale": {"by": 2}})
    batch = {"pixel_values": torch.randn(4, 8, 9, 9), "scale": {"by": 2}}
    restored = restore_norms(net, report, plain, [batch])
    assert relative_error(restored(**batch), net(**batch)) < 1e-5
    with pytest.raises(ValueError, match=r"example_input of shape \[1, 8, 9, 9\].*TypeError: .*NoneType"):
        replace_convs(ByName(), "dbb", example_input={"pixel_values": x})
    with pytest.raises(ValueError, match="example_input of no tensor.*unexpected keyword argument 'image'"):
        replace_convs(ByName(), "dbb", example_input={"image": "a.jpg"})


def test_a_norm_without_a_bias_stays():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, bias=False))
    with pytest.raises(NothingSwappedError, match="1 has no gamma, no bias or no running statistics"):
        replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize("layers", [
    (nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)), (nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())])
def test_a_lazy_network_is_run_first(layers):
    net, x = nn.Sequential(*layers), torch.zeros(1, 3, 9, 9)
    with pytest.raises(ValueError, match="has lazy modules, which have no shapes yet"):
        replace_convs(net, "dbb", example_input=x)
    net(x)
    assert replace_convs(net, "dbb", example_input=x)[1][0].block
