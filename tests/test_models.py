"""Every backbone with every block: equivalence of whole networks, shapes, strides, and devices without a GPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbb import BLOCKS, branchwise, reparameterize
from models import BACKBONES, build_model
from tests.conftest import randomize, relative_error

EVERY = pytest.mark.parametrize("name", BACKBONES)
BLOCK = pytest.mark.parametrize("block", BLOCKS)


@EVERY
@BLOCK
def test_converted_network_is_the_same_function(name, block):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        net = randomize(build_model(name, 10, block, image_size=32)).to(dtype).eval()
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
        with torch.no_grad():
            with branchwise(net):
                expected = net(x)
            assert expected.isfinite().all()
            assert relative_error(reparameterize(net)(x), expected) < tolerance


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_nothing_is_left_on_the_cpu(name, training, block):
    """A forward pass on a fake GPU fails where a tensor was made on the CPU."""
    net = build_model(name, 10, block, image_size=32).train(training)
    with FakeTensorMode():
        state = {key: torch.empty(value.shape, dtype=value.dtype, device="cuda")
                 for key, value in [*net.named_parameters(), *net.named_buffers()]}
        logits = torch.func.functional_call(net, state, (torch.empty(4, 3, 32, 32, device="cuda"),))
    assert logits.device.type == "cuda"
    assert logits.shape == (4, 10)


def test_the_fake_gpu_catches_a_misplaced_tensor():
    class Misplaced(nn.Module):
        def forward(self, x):
            return x + torch.ones(3)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cuda.*cpu|two different devices"):
        Misplaced()(torch.empty(3, device="cuda"))


@pytest.mark.parametrize(("name", "small", "large"), [("resnet18", 8, 32), ("resnet50", 8, 32), ("mobilenet_v1", 8, 32),
                                                      ("mobilenet_v2", 8, 32), ("resnet20", 4, 4), ("vgg16", 32, 32)])
def test_total_stride(name, small, large):
    assert build_model(name, 10, image_size=32).total_stride == small
    assert build_model(name, 10, image_size=128).total_stride == large


def test_parameter_counts_are_the_published_ones():
    def millions(name, block, classes, size=224):
        return sum(p.numel() for p in build_model(name, classes, block, size).parameters()) / 1e6
    assert millions("resnet20", None, 10) == pytest.approx(0.27, abs=0.005)  # He et al., table 6
    assert millions("resnet56", None, 10) == pytest.approx(0.85, abs=0.005)
    # The authors' code; theirs counts two vectors a branch that have no effect, and that ours does not have.
    assert millions("resnet18", "dbb", 1000) == pytest.approx(26.29, abs=0.02)
    assert millions("mobilenet_v1", "dbb", 1000) == pytest.approx(4.37, abs=0.02)


def test_papers_variants():
    assert any(isinstance(m, nn.ReLU) for m in build_model("mobilenet_v1", 10).modules())
    assert not any(isinstance(m, nn.ReLU6) for m in build_model("mobilenet_v1", 10).modules())
    assert all((m.weight == 1).all() for m in build_model("resnet18", 10).modules() if isinstance(m, nn.BatchNorm2d))


def test_block_and_baseline_start_from_the_same_kernels():
    torch.manual_seed(0)
    plain = build_model("resnet20", 10)
    torch.manual_seed(0)
    swapped = build_model("resnet20", 10, "dbb")
    assert torch.equal(plain.blocks[3].conv1.weight, swapped.blocks[3].conv1.branches["kxk"].weight)


@pytest.mark.parametrize(("name", "message"), [("resnet19", "resnet18"), ("hf-hub:someone/something", "unknown here and to timm")])
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10)


def test_image_too_small():
    with pytest.raises(ValueError, match="vgg16 cannot take images of 16 pixels"):
        build_model("vgg16", 10, image_size=16)
