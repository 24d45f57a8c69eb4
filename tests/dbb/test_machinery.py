"""Blocks in eval under torch's other machinery: torch.func, torch.jit.trace, torch.fx."""

import copy

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

from dbb import AsymmetricConvBlock, DiverseBranchBlock, OnlineReparamBlock, reparameterize, replace_convs
from models import build_model
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.slow

BLOCKS = [(kind, groups) for kind in (DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock)
          for groups in (1, 2, 8)]


def make(kind, groups):
    return randomize(kind(8, 8, 3, padding=1, groups=groups)).double().eval()


@pytest.mark.parametrize(("kind", "groups"), BLOCKS)
def test_gradients_by_image(kind, groups):
    """`vmap` of `grad` against one backward pass an image."""
    block, x = make(kind, groups), torch.randn(3, 8, 6, 6).double()
    parameters, buffers = dict(block.named_parameters()), dict(block.named_buffers())

    def loss(parameters, image):
        return functional_call(block, (parameters, buffers), (image[None],)).square().sum()

    by_image = vmap(grad(loss), (None, 0))(parameters, x)
    for index, image in enumerate(x):
        wanted = torch.autograd.grad(block(image[None]).square().sum(), [*parameters.values()],
                                     materialize_grads=True)
        for found, gradient in zip(by_image.values(), wanted, strict=True):
            assert torch.allclose(found[index], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "groups"), BLOCKS)
def test_forward_mode_and_ensembles(kind, groups):
    blocks, x = [make(kind, groups) for _ in range(3)], torch.randn(2, 8, 6, 6).double()
    plain = reparameterize(blocks[0])
    direction = torch.randn_like(x)
    found, wanted = (jvp(net, (x,), (direction,))[1] for net in (blocks[0], plain))
    assert relative_error(found, wanted) < 1e-12

    def call(parameters, buffers):
        return functional_call(blocks[0], (parameters, buffers), (x,))

    together = vmap(call)(*stack_module_state(blocks))
    for found, block in zip(together, blocks, strict=True):
        assert relative_error(found, block(x)) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_fx_and_feature_extractors_keep_blocks(training):
    net = build_model("resnet20", 10, "dbb", image_size=32).train(training)
    net, x = randomize(net), torch.randn(2, 3, 32, 32)
    traced = fx.symbolic_trace(net)
    assert any(isinstance(module, DiverseBranchBlock) for module in traced.modules())
    extractor = create_feature_extractor(net, ["blocks.0.conv1"])
    with torch.no_grad():
        if not training:
            assert torch.equal(traced(x), net(x))
        assert extractor(x)["blocks.0.conv1"].shape == (2, 16, 32, 32)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_fx_of_a_block_by_itself(padding_mode):
    block = randomize(DiverseBranchBlock(4, 4, 3, padding=1, padding_mode=padding_mode)).double().eval()
    x = torch.randn(2, 4, 6, 6).double()
    assert relative_error(fx.symbolic_trace(block)(x), block(x)) < 1e-12
    with pytest.raises(ValueError, match="in training mode: trace a network around it"):
        fx.symbolic_trace(block.train())


@pytest.mark.parametrize(("kind", "groups"), BLOCKS)
def test_a_traced_block_is_saved_and_loaded(kind, groups, tmp_path):
    net = nn.Sequential(make(kind, groups), nn.ReLU())
    x = torch.randn(2, 8, 6, 6).double()
    torch.jit.trace(net, x).save(tmp_path / "net.pt")
    assert relative_error(torch.jit.load(tmp_path / "net.pt")(x), net(x)) < 1e-12


def test_compile_for_sizes_that_are_not_known():
    net, _ = replace_convs(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)), "dbb",
                           example_input=torch.randn(2, 8, 6, 6))
    compiled = torch.compile(net, backend="eager", dynamic=True)
    for size in (8, 12):
        x = torch.randn(2, 8, size, size)
        assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_what_inductor_makes_of_a_network_is_the_network():
    """Inductor lays maps out in its own way; a block's input is a convolution's output."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), DiverseBranchBlock(8, 8, 3, padding=1, mode="online"))
    net, x = randomize(net).double(), torch.randn(16, 3, 12, 12).double()
    compiled = copy.deepcopy(net)
    y, z = net(x), torch.compile(compiled, fullgraph=True)(x)
    assert relative_error(z, y) < 1e-12
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    z.backward(cotangent)
    for (name, found), wanted in zip(compiled.named_parameters(), net.parameters(), strict=True):
        assert relative_error(found.grad, wanted.grad) < 1e-9, name
    for (name, found), wanted in zip(compiled.named_buffers(), net.buffers(), strict=True):
        assert relative_error(found, wanted) < 1e-12, name


def test_many_image_sizes_make_few_graphs():
    """A sample's windows are disjoint on large maps, where their gradients are added in another way."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), DiverseBranchBlock(4, 4, 3, padding=1, mode="online")).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for size in (28, 36, 44, 52):
        x = torch.randn(4, 4, size, size).double()
        cotangent = torch.randn_like(x)
        grads, wanted = (torch.autograd.grad(run(x), list(net.parameters()), cotangent)
                         for run in (compiled, net))
        assert all(relative_error(*both) < 1e-10 for both in zip(grads, wanted, strict=True))
    assert counter.frame_count <= 2


class Captured(TorchDispatchMode):
    """Fails where a CUDA graph, which replays the work of the GPU alone, could not be recorded."""

    reads = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in tensors)
        if name in self.reads or masks or len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{name} cannot be captured")
        return out


@pytest.mark.parametrize(("mode", "kind"), [("exact", DiverseBranchBlock), ("online", DiverseBranchBlock),
                                            ("exact", AsymmetricConvBlock), ("linear", OnlineReparamBlock)])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_step_can_be_captured(mode, kind, groups):
    """A step on the CPU reads no number; a forward pass on a fake GPU copies nothing to or from it."""
    block = kind(8, 8, 3, padding=1, groups=groups, mode=mode)
    with Captured():
        block(torch.randn(4, 8, 16, 16, requires_grad=True)).sum().backward()
    with FakeTensorMode():
        state = {key: torch.empty(value.shape, dtype=value.dtype, device="cuda")
                 for key, value in [*block.named_parameters(), *block.named_buffers()]}
        image = torch.empty(4, 8, 16, 16, device="cuda")
        with Captured():
            assert functional_call(block, state, (image,)).device.type == "cuda"


@pytest.mark.parametrize("step", [lambda x: x * x.max().item(), lambda x: x[x > 0],
                                  lambda x: x + torch.ones(3).to(x.device)])
def test_what_cannot_be_captured_is_seen(step):
    with FakeTensorMode(), Captured(), pytest.raises(Exception, match="captured|local_scalar|nonzero"):
        step(torch.empty(3, device="cuda"))
