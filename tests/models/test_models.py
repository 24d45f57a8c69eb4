"""Every backbone with every block: equivalence of whole networks, shapes, strides, devices without a GPU."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from dbb import branchwise, reparameterize
from models import build_model
from models.build import OF_TIMM
from tests.helpers import randomize, relative_error
from tests.models.networks import PAIRS, build, images

pytestmark = pytest.mark.slow


SLOW = ("resnet18", "resnet34", "vgg16")  # and like others here


@pytest.mark.parametrize(("name", "block"), [pair for pair in PAIRS if pair[0] not in SLOW])
def test_converted_network_is_the_same_function(name, block):
    torch.manual_seed(0)
    net = randomize(build(name, block)).eval()
    x, drawn = images(name), {}
    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            net = net.to(dtype)
            with branchwise(net):
                drawn[dtype] = net(x.to(dtype))
            assert drawn[dtype].isfinite().all()
            # 2e-5 in float32 where random statistics saturate a ReLU6.
            rounding = relative_error(drawn[dtype], drawn[torch.float64])
            converted = reparameterize(net)(x.to(dtype))
            assert relative_error(converted, drawn[dtype]) < max(tolerance, 2 * rounding)


@pytest.mark.parametrize(("name", "small", "large"), [
    ("resnet18", 8, 32), ("resnet50", 8, 32), ("mobilenet_v1", 8, 32), ("mobilenet_v2", 8, 32),
    ("resnet20", 4, 4), ("wrn16_8", 4, 4), ("vgg16", 32, 32)])
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
    norms = [module for module in build_model("resnet18", 10).modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)


def test_airbench_whitens_patches():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8).cumsum(3).cumsum(1)  # neighbours and channels that are alike
    net = build_model("airbench", 10, image_size=32)
    net.whiten(images, eps=0.0)
    y = torch.nn.functional.conv2d(images, net.whitening.weight).double().transpose(0, 1).flatten(1)
    assert relative_error(y[:12] @ y[:12].T / y.shape[1], torch.eye(12)) < 1e-4
    assert torch.equal(y[12:], -y[:12])
    assert not net.whitening.weight.requires_grad


def test_block_and_baseline_start_from_the_same_kernels():
    torch.manual_seed(0)
    plain = build_model("resnet20", 10)
    torch.manual_seed(0)
    swapped = build_model("resnet20", 10, "dbb")
    assert torch.equal(plain.blocks[3].conv1.weight, swapped.blocks[3].conv1.branches["kxk"].weight)


@pytest.mark.parametrize(("name", "message"), [
    ("resnet19", "resnet18"), ("hf-hub:someone/something", "unknown here and to timm")])
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10)


def test_image_too_small():
    with pytest.raises(ValueError, match="mvitv2_tiny cannot take images of 330 pixels"):
        build_model("mvitv2_tiny", 10, image_size=330)
    with pytest.raises(ValueError, match="vgg16 cannot take images of 16 pixels"):
        build_model("vgg16", 10, image_size=16)


def test_warm_start_is_the_same_function():
    torch.manual_seed(0)
    plain = randomize(build_model("resnet18", 10, image_size=128)).double()
    net = build_model("resnet18", 10, "dbb", image_size=128, weights=plain.state_dict()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(net.eval()(x), plain.eval()(x)) < 1e-6, "the weights went through float32"
    weights = {key: value.float() for key, value in plain.state_dict().items()}
    net, plain = build_model("resnet18", 10, "dbb", image_size=128, weights=weights).double(), \
        build_model("resnet18", 10, image_size=128, weights=weights).double()
    with torch.no_grad():
        assert relative_error(net.eval()(x), plain.eval()(x)) < 1e-12
        assert relative_error(net.train()(x), plain.train()(x)) < 1e-12


@pytest.mark.parametrize(("name", "theirs"), [("resnet18", "resnet18"), ("mobilenet_v2", "mobilenet_v2")])
def test_torchvision_weights_are_a_warm_start(name, theirs, capsys):
    torch.manual_seed(0)
    plain = randomize(torchvision.models.get_model(theirs, num_classes=7)).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        warm = build_model(name, 7, "dbb", weights=plain.state_dict()).eval()
        assert relative_error(warm(x), plain(x)) < 1e-5
    assert not capsys.readouterr().out
    net = build_model(name, 5, "dbb", weights=plain.state_dict())
    printed = capsys.readouterr().out
    assert "the file has 7 classes, the data 5: not from the file, so they start at random: " in printed
    assert net(x).shape == (2, 5)
    head = next(key for key in reversed(plain.state_dict()) if key.endswith("weight"))
    for wrong, message in ((torch.tensor(3.0), "of another shape"), (torch.zeros(7, 5), "of another shape"),
                           (torch.full((7, plain.state_dict()[head].shape[1]), torch.nan), "not all finite")):
        with pytest.raises(ValueError, match=message):
            build_model(name, 7, weights=plain.state_dict() | {head: wrong})
    with pytest.raises(ValueError, match="another network: .*missing.*unexpected"):
        build_model(name, 7, weights={f"{key}.x": value for key, value in plain.state_dict().items()})


def test_pretrained_weights_of_timm(timms_file):
    plain = timms_file("resnet18")
    net = build_model("resnet18", 1000, "dbb", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(net(x), plain(x)) < 1e-5


@pytest.fixture
def timms_file(tmp_path, monkeypatch):
    """What timm would fetch comes from a file here, with random statistics; the rest is timm's own way."""
    create = timm.create_model

    def write(name):
        torch.manual_seed(0)
        plain = randomize(create(name, num_classes=1000)).eval()
        torch.save(plain.state_dict(), tmp_path / "theirs.pth")
        overlay = {"file": str(tmp_path / "theirs.pth")}
        monkeypatch.setattr(timm, "create_model", partial(create, pretrained_cfg_overlay=overlay))
        return plain
    return write


@pytest.mark.parametrize(("name", "size", "classes", "fresh"), [
    ("resnet18", 224, 1000, ""), ("resnet18", 224, 10, "fc.weight, fc.bias"),
    ("resnet18", 32, 1000, "conv1.weight"), ("resnet18", 32, 10, "conv1.weight, fc.weight, fc.bias"),
    ("mobilenetv2_100", 96, 10, "classifier.weight, classifier.bias")])
def test_what_does_not_come_from_the_file_is_named(timms_file, capsys, name, size, classes, fresh):
    plain = timms_file(name).state_dict()
    torch.manual_seed(1)
    net = build_model(name, classes, image_size=size, pretrained=True)
    printed = capsys.readouterr().out
    told = f"model.pretrained=true: not from the file, so they start at random: {fresh}\n"
    assert printed == (told if fresh else "")
    changed = [key for key, value in net.state_dict().items() if not torch.equal(plain[key], value)]
    assert ", ".join(changed) == fresh


def test_other_strides_than_the_weights_had_are_told(timms_file, capsys):
    timms_file("mobilenetv2_100")
    assert build_model("mobilenet_v2", 1000, image_size=32, pretrained=True).total_stride == 8
    printed = capsys.readouterr().out
    assert "at 32 pixels conv_stem, blocks.1.0.conv_dw have stride 1, where timm's" in printed


def test_relu6_weights_do_not_become_a_relu_network():
    plain = randomize(timm.create_model("mobilenetv1_100", num_classes=10))
    message = "model.name=mobilenet_v1 has ReLU; .*take model=timm model.name=mobilenetv1_100"
    for wrong in ({"pretrained": True}, {"weights": plain.state_dict()},
                  {"weights": plain.state_dict(), "weights_of": "mobilenetv1_100"}):
        with pytest.raises(ValueError, match=message):
            build_model("mobilenet_v1", 10, "dbb", 96, **wrong)
    x, ours = torch.randn(2, 3, 96, 96), randomize(build_model("mobilenet_v1", 10, image_size=96))
    for name, theirs in (("mobilenetv1_100", plain), ("mobilenet_v1", ours)):
        net = build_model(name, 10, "dbb", 96, weights=theirs.state_dict(), weights_of=name)
        with torch.no_grad():
            assert relative_error(net.eval()(x), theirs.eval()(x)) < 1e-5


@pytest.mark.parametrize(("name", "weights_of"), [
    ("resnet10t.c3_in1k", "resnet10t"), ("resnet10t", "resnet10t.c3_in1k")])
def test_a_tag_of_timms_names_weights_not_a_network(name, weights_of):
    theirs = timm.create_model("resnet10t", num_classes=10)
    net = build_model(name, 10, image_size=64, weights=theirs.state_dict(), weights_of=weights_of)
    assert torch.equal(net.fc.weight, theirs.fc.weight)


def test_no_other_backbone_differs_from_what_timms_weights_are_of():
    """The same function with the same weights, or else timm's weights are refused."""
    x, different = torch.randn(2, 3, 96, 96), set()
    for name in OF_TIMM:
        plain = randomize(timm.create_model(OF_TIMM[name].args[0], num_classes=10)).eval()
        ours = build_model(name, 10, image_size=96).eval()
        ours.load_state_dict(plain.state_dict())
        with torch.no_grad():
            if relative_error(ours(x), plain(x)) > 1e-6:
                different.add(name)
    assert different == {name for name in OF_TIMM if OF_TIMM[name].keywords} == {"mobilenet_v1"}


def test_fine_tuning_before_and_after_conversion():
    torch.manual_seed(0)
    weights = build_model("resnet20", 10).state_dict()
    net = build_model("resnet20", 10, "dbb", weights=weights)
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10

    def fit(net):
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), []
        for _ in range(8):
            losses.append(nn.functional.cross_entropy(net(x), y))
            optimizer.zero_grad()
            losses[-1].backward()
            assert all(p.grad is not None for p in net.parameters())
            optimizer.step()
        assert losses[-1] < losses[0]
        return net
    fit(net.train())
    gammas = [branch.bn.weight for branch in net.blocks[0].conv1.branches.values()]
    assert all(gamma.abs().min() > 0 for gamma in gammas), "branches of gamma 0 learn"
    fit(reparameterize(net.eval()).train())
