"""Cases from public bug reports about neighbouring software: a block works where a plain convolution does."""

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models.byobnet import RepVggBlock
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from dbb import (
    MODES,
    AsymmetricConvBlock,
    DiverseBranchBlock,
    NothingSwappedError,
    OnlineReparamBlock,
    ReparamConv2d,
    branchwise,
    fold_norms,
    reparameterize,
    replace_convs,
    restore_norms,
)
from dbb.norms import running
from tests.conftest import randomize, relative_error

EVERY_BRANCH = ("kxk", "1x1", "1x1_avg", "1x1_kxk", "1x1_prior", "dw_1x1", "identity", "avg", "1xk", "kx1")


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


def pair(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


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


def _eval_and_freeze(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return net


def _torchvisions(net):
    """As a user puts in torchvision's own frozen norm, which knows nothing of timm's."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.weight.dtype)
            frozen.load_state_dict({key: module.state_dict()[key] for key in frozen.state_dict()})
            net.set_submodule(name, frozen)
    return net


class Detrs(nn.Module):
    """DETR's frozen norm, which has its epsilon in its code."""

    def __init__(self, norm, hidden=1e-5):
        super().__init__()
        self.hidden = hidden
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(norm, key).detach().clone())

    def forward(self, x):
        w, b, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = w * (var + self.hidden).rsqrt()
        return x * scale + (b - mean * scale)


def _detrs(net):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, Detrs(module))
    return net


def _timms(net):
    timm.utils.freeze(net, [name for name, _ in net.named_children()])
    return net


@pytest.mark.parametrize("block", ["dbb", "acb", "orepa", "online"])
@pytest.mark.parametrize("freeze", [
    timm.layers.freeze_batch_norm_2d, _timms, _torchvisions, _detrs, _eval_and_freeze])
def test_frozen_norms_of_any_class_mean_running_statistics(block, freeze):
    """In training, a block whose norms are frozen computes what it does in eval, and moves no statistic."""
    torch.manual_seed(0)
    kind = {"dbb": DiverseBranchBlock, "acb": AsymmetricConvBlock, "orepa": OnlineReparamBlock,
            "online": partial(DiverseBranchBlock, mode="online", positions=4)}[block]
    for groups in (1, 8):
        net = nn.Sequential(nn.Sequential(kind(8, 8, 3, padding=1, groups=groups)))
        randomize(net.double())
        x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
        expected = net.eval()(x)
        frozen = freeze(net.train()) if freeze is _eval_and_freeze else freeze(net).train()
        before = copy.deepcopy(frozen.state_dict())
        assert relative_error(frozen(x), expected) < 1e-12
        assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
        assert relative_error(reparameterize(frozen.eval())(x), expected) < 1e-12
        kernels = [p for p in frozen.parameters() if p.ndim == 4]
        if freeze is not _timms:  # which freezes the kernels too
            frozen.train()(x).square().sum().backward()
            assert all(p.grad is not None for p in kernels)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_an_epsilon_in_the_code_is_found(eps):
    norm = Detrs(randomize(nn.BatchNorm2d(8)), eps).to(torch.float16)
    before = copy.deepcopy(norm.state_dict())
    assert running(norm)[-1] == pytest.approx(eps, rel=1e-12, abs=0)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("block", ["dbb", "orepa"])
def test_what_is_no_norm_is_named(block):
    net, _ = replace_convs(pair(), block, example_input=torch.zeros(1, 8, 9, 9))
    for outer in net[0].norms():
        name = next(name for name, module in net.named_modules() if module is outer)
        net.set_submodule(name, nn.GroupNorm(2, 8))
    message = "a block's norm was replaced by a GroupNorm, .* no attribute 'running_mean'"
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(2, 8, 9, 9))


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


def _ultralytics_fuse(net: nn.Module) -> nn.Module:
    """What Ultralytics' `fuse` does with its units: a convolution's bias counts, the norm is folded in."""
    for unit in net.modules():
        if isinstance(unit, ConvNormAct):
            conv, norm = unit.conv, unit.bn
            fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                              conv.padding, conv.dilation, conv.groups, bias=True).to(conv.weight)
            scale = norm.weight.div(torch.sqrt(norm.eps + norm.running_var))
            kernel = torch.mm(torch.diag(scale), conv.weight.view(conv.out_channels, -1))
            bias = torch.zeros(len(scale)).to(scale) if conv.bias is None else conv.bias
            bias = torch.mm(torch.diag(scale), bias.reshape(-1, 1)).reshape(-1)
            bias = bias + norm.bias - scale * norm.running_mean
            fused.weight.data.copy_(kernel.view(fused.weight.shape))
            fused.bias.data.copy_(bias)
            unit.conv = fused
            unit.bn = copy.deepcopy(norm) if isinstance(norm, nn.Sequential) else nn.Identity()
    return net


@pytest.mark.parametrize("before", [False, True])
def test_a_host_that_folds_norms_itself(before):
    torch.manual_seed(0)
    net = nn.Sequential(ConvNormAct(3, 8, 3), ConvNormAct(8, 8, 3, stride=2))
    new, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 12, 12))
    assert all(row.block for row in report)
    randomize(new.double()).eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    expected = new(x)
    with torch.no_grad():
        fused = _ultralytics_fuse(copy.deepcopy(new) if before else reparameterize(new))
    assert relative_error(fused(x), expected) < 1e-12
    assert not any(isinstance(module, ReparamConv2d) for module in fused.modules())


@pytest.mark.parametrize("name", [
    "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_families_that_merge_their_own_branches(name):
    """What another library's unit merges itself stays, with the reason; its own conversion then works."""
    net, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    try:
        net, report = replace_convs(net, "acb", example_input=x)
    except NothingSwappedError as error:
        report = error.report
    assert any("which merges its branches itself" in row.reason for row in report if row.block is None)
    with torch.no_grad():
        assert relative_error(timm.utils.reparameterize_model(net)(x), net(x)) < 1e-4


def test_what_merges_itself_can_be_included():
    net, x = timm.create_model("repghostnet_050", num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    _, report = replace_convs(net, "acb", example_input=x)
    included, all_of_it = replace_convs(net, "acb", include=["*"], example_input=x)
    assert sum(row.block is not None for row in report) == 10
    assert sum(row.block is not None for row in all_of_it) == 42
    with torch.no_grad():
        assert relative_error(reparameterize(included)(x), included(x)) < 1e-4
        folded = fold_norms(included, x)
        assert relative_error(folded(x), included(x)) < 1e-4
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    without_a_convolution = [".fusion_bn." in name for name in left]
    assert all(without_a_convolution), "all others are folded, inside such modules too"


def test_a_network_that_torch_fuses():
    """Torch's `fuse_modules` takes BatchNorm2d alone: such a network stays, or gets its norms back."""
    plain = torchvision.models.quantization.shufflenet_v2_x0_5(num_classes=3).eval()
    x = torch.randn(4, 3, 64, 64)
    with pytest.raises(NothingSwappedError, match=r"part of a QuantizableShuffleNetV2, .* \(fuse_model\)"):
        replace_convs(plain, "acb", example_input=x)
    net, report = replace_convs(plain, "acb", include=["*"], example_input=x)
    with torch.no_grad():
        restored = restore_norms(net, report, plain, [x])
        restored.fuse_model(is_qat=False)
        assert relative_error(restored(x), net(x)) < 1e-4


def test_a_network_with_a_fuse_of_its_own_is_swapped():
    class Root(nn.Sequential):
        def fuse(self):
            raise AssertionError

    class Neck(nn.Sequential):
        def fuse(self, x, y):
            """Joins two maps: no step of a conversion."""

    _, report = replace_convs(Root(Neck(*pair())), "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert report[0].block


@pytest.mark.parametrize("step", ["repvgg_convert", "local_inject", "switch_to_deploy"])
def test_units_that_merge_themselves_by_any_name_stay(step):
    """Their steps leave out a convolution's bias, which is where a block's norms end up."""
    unit = type("Unit", (nn.Sequential,), {step: lambda self: None})
    plain = nn.Sequential(unit(*pair()), *pair())
    _, report = replace_convs(plain, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert [row.block is not None for row in report] == [False, True]
    assert step in report[0].reason


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


def test_a_swap_keeps_what_is_frozen():
    """Per parameter, and for Lightning's way to freeze a norm, which is before the swap."""
    net = pair()
    net[1].track_running_stats = False
    net[0].weight.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    new, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert {key.split(".")[-1] for key, p in new.named_parameters() if p.requires_grad} == {"bias"}
    before = copy.deepcopy(new.state_dict())
    new.train()(torch.randn(4, 8, 9, 9))
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


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


@pytest.mark.parametrize("kind", [DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock])
def test_half_precision_with_norms_in_float32(kind):
    block = kind(8, 8, 3, padding=1).bfloat16()
    for norm in block.norms():
        norm.float()
    x = torch.randn(4, 8, 10, 10, dtype=torch.bfloat16)
    block(x).float().square().mean().backward()
    y = block.eval()(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(reparameterize(block)(x), y) < 0.02


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 8])
def test_half_precision_with_norms_in_float32_and_branches_without_a_kernel(mode, groups):
    block = ReparamConv2d(8, 8, 3, padding=1, groups=groups, branches=["kxk", "identity", "avg"],
                          mode=mode, positions=8).bfloat16()
    for norm in block.norms():
        norm.float()
    x = torch.randn(4, 8, 10, 10, dtype=torch.bfloat16)
    block(x).float().square().mean().backward()
    y = block.eval()(x)
    with branchwise(block):
        assert relative_error(block(x), y) < 0.02
    assert relative_error(reparameterize(block)(x), y) < 0.02
    assert y.dtype == torch.bfloat16


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


def test_an_included_host_fails_loudly():
    """Its step would leave out the merged bias."""
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), RepVggBlock(8, 8, 3))).eval()
    new, _ = replace_convs(net, "acb", include=["1.*"], example_input=torch.zeros(1, 3, 9, 9))
    for network in (new, reparameterize(new)):
        with pytest.raises(AttributeError, match="running_mean"):
            network[1].reparameterize()


def test_a_network_in_a_wrapper_is_no_unit():
    class Detector(nn.Sequential):
        def fuse(self):
            raise AssertionError

        def is_fused(self):
            return False

    net = nn.Sequential(Detector(*pair(), *pair()))
    _, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert all(row.block for row in report)


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


@pytest.mark.parametrize("key", ["weight", "bias", "running_mean", "running_var"])
def test_a_value_that_half_precision_cannot_hold_stays_in_a_float32_norm(key):
    net = pair()
    with torch.no_grad():
        net[1].state_dict(keep_vars=True)[key][3] = 1e5
    net[0].half()
    net, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9).half(), init="ones")
    assert net[0].branches["kxk"].bn.state_dict()[key][3] == 1e5


def test_a_merged_value_that_half_precision_cannot_hold_is_named():
    block = DiverseBranchBlock(8, 8, 3, padding=1).half().eval()
    block.init_gamma(6e4)
    with torch.no_grad():
        block.branches["kxk"].weight.fill_(2)
    message = "the merged kernel has the value .*, which torch.float16 cannot hold"
    with pytest.raises(ValueError, match=message):
        block.fuse()


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


def test_torchvisions_frozen_backbones_say_why():
    net = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    with pytest.raises(NothingSwappedError, match="no BatchNorm2d follows"):
        replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 64, 64))
