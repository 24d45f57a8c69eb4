"""Norms restored and folded: stock networks that compute what the blocks did."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from dbb import DiverseBranchBlock, branchwise, fold_norms, replace_convs, restore_norms
from models import build_model
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CASES = [("resnet8", 16, "dbb"), ("resnet18", 32, "acb"), ("mobilenet_v1", 32, "dbb"),
         ("mobilenet_v2", 64, "dbb"), ("vgg16", 32, "acb"), ("efficientnet_lite0", 64, "dbb")]


@pytest.mark.parametrize(("name", "size", "block"), CASES)
def test_stock_network_computes_the_same(name, size, block):
    net, plain = randomize(build_model(name, 7, block, size)).eval(), build_model(name, 7, image_size=size)
    images = torch.randn(6, 3, size, size)
    with torch.no_grad(), branchwise(net):
        expected = net(images)
        stock = restore_norms(net, net.report, plain, images.split(2))
        assert relative_error(stock(images), expected) < 1e-12
        folded = fold_norms(net, images[:1])
        assert relative_error(folded(images), expected) < 1e-12
    shapes, expected = ({k: v.shape for k, v in net.state_dict().items()} for net in (stock, plain))
    assert shapes == expected
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_norms_hold_the_statistics_of_their_convolutions():
    net = randomize(build_model("resnet8", 4, "dbb", 16)).eval()
    images = torch.randn(9, 3, 16, 16)
    stock = restore_norms(net, net.report, build_model("resnet8", 4, image_size=16), images.split(4))
    with torch.no_grad():  # in training on the same images, the norms find what they hold
        x = stock.conv1(images)
        assert relative_error(stock.bn1.running_mean, x.mean((0, 2, 3))) < 1e-12
        assert relative_error(stock.bn1.running_var, x.var((0, 2, 3))) < 1e-12
        y = F.relu(stock.bn1(x))
        z = stock.blocks[0].conv1(y)
        assert relative_error(stock.blocks[0].bn1.running_mean, z.mean((0, 2, 3))) < 1e-12
        eval_logits = stock(images)
        for module in stock.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        assert relative_error(stock.train()(images), eval_logits) < 5e-3  # but for n / (n - 1)


def test_fine_tuning_starts_where_the_network_stood():
    """With mean 0 and variance 1 in the norms, the same steps start from another loss."""
    torch.set_default_dtype(torch.float32)
    net = build_model("resnet18", 10, "dbb", 72)
    images, targets = torch.randn(16, 3, 72, 72), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(images), targets).backward()
        optimizer.step()
    for module in net.modules():  # running statistics of these images
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        net(images)
        loss = F.cross_entropy(net.eval()(images), targets).item()
    filled = restore_norms(net, net.report, build_model("resnet18", 10, image_size=72), images.split(8))
    stock = timm.create_model("resnet18", num_classes=10)
    stock.load_state_dict(filled.state_dict(), strict=True)
    naive = copy.deepcopy(stock)
    for row in net.report:
        if row.block:
            norm = naive.get_submodule(row.norm)
            norm.bias.data -= norm.running_mean
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.data.fill_(1)

    def losses(model):
        optimizer, found = torch.optim.SGD(model.train().parameters(), 0.001), []
        for _ in range(3):
            optimizer.zero_grad()
            value = F.cross_entropy(model(images), targets)
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    with torch.no_grad():
        evaluated = F.cross_entropy(naive.eval()(images), targets).item()
        assert abs(evaluated - loss) < 1e-3 * loss, "the same function in eval"
    tuned = losses(stock)
    assert abs(tuned[0] - loss) < 0.1 * loss
    assert tuned[-1] < tuned[0]
    assert abs(losses(naive)[0] - loss) > 0.5 * loss


def test_convolutions_with_a_bias_and_norms_with_a_parametric_activation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.PReLU)

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3))

    plain = Net()
    nn.init.constant_(plain.norm.act.weight, 0.7)
    x = torch.randn(5, 3, 8, 8)
    net, report = replace_convs(plain, "dbb", example_input=x)
    randomize(net).eval()
    fresh = Net()
    stock = restore_norms(net, report, fresh, [x])
    with torch.no_grad():
        assert relative_error(stock(x), net(x)) < 1e-12
    assert stock.conv.bias.abs().max() > 0
    assert torch.equal(stock.norm.act.weight, plain.norm.act.weight)


def test_another_plain_network_is_refused():
    net = build_model("resnet8", 4, "dbb", 16).eval()
    images = [torch.randn(2, 3, 16, 16)]
    for other, size in (("resnet20", 16), ("vgg16", 32)):
        with pytest.raises(ValueError, match="plain is not the network"):
            restore_norms(net, net.report, build_model(other, 4, image_size=size), images)
    with pytest.raises(ValueError, match="training mode"):
        restore_norms(net.train(), net.report, build_model("resnet8", 4, image_size=16), images)


def test_fold_norms_without_norms_and_of_a_block_alone():
    x = torch.randn(2, 3, 8, 8)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert torch.equal(fold_norms(bare, x)(x), bare(x))
    block = randomize(DiverseBranchBlock(3, 4, 3)).eval()
    folded = fold_norms(nn.Sequential(block), x)
    assert type(folded[0]) is nn.Conv2d
    assert relative_error(folded(x), block(x)) < 1e-12
