"""Subclasses of Conv2d: kept where that is exact, else left alone with the reason."""

import copy
import pickle

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

from dbb import branchwise, reparameterize, replace_convs
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.slow


def test_subclasses_that_prepare_their_input_are_kept():
    """Timm's dynamic "same" padding, and one of our own: the block sits in for the convolution inside."""
    class Panorama(nn.Conv2d):  # circular in one axis
        def forward(self, x):
            return self._conv_forward(F.pad(x, (1, 1, 0, 0), mode="circular"), self.weight, self.bias)

    net = nn.Sequential(Panorama(3, 8, 3, stride=2, padding=(1, 0)), nn.BatchNorm2d(8), nn.ReLU(),
                        Conv2dSame(8, 8, (3, 2), stride=2, groups=2, bias=False), nn.BatchNorm2d(8))
    net = randomize(net.double().eval())
    example = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    new, report = replace_convs(net, "dbb", example_input=example, init="single")
    assert all(row.block for row in report)
    single = copy.deepcopy(new)
    randomize(new)
    merged = reparameterize(new)
    assert [type(merged[i]) for i in (0, 3)] == [Panorama, Conv2dSame]
    shapes, expected = ({key: value.shape for key, value in model.state_dict().items()}
                        for model in (merged, net))
    assert set(shapes.items()) - {("3.bias", (8,))} <= set(expected.items())
    with torch.no_grad():
        for size in (12, 11, 9):  # the padding depends on the size, and is not that of the example
            x = torch.randn(4, 3, size, size + 1, dtype=torch.float64)
            assert relative_error(single(x), net(x)) < 1e-12
            with branchwise(new):
                expected = new(x)
            assert relative_error(new(x), expected) < 1e-12
            assert relative_error(merged(x), expected) < 1e-12
            assert relative_error(copy.deepcopy(single).train()(x), copy.deepcopy(net).train()(x)) < 1e-12
        deployed = copy.deepcopy(new)
        deployed[0].switch_to_deploy()
        assert relative_error(deployed(x), expected) < 1e-12
        compiled = torch.compile(copy.deepcopy(new), fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) < 1e-12
        assert relative_error(pickle.loads(pickle.dumps(new[3]))(new[:3](x)), new[:4](x)) == 0


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class ByItsWeight(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x / self.weight.abs().mean(), self.weight, self.bias)


class ByItsMode(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x * 2 if self.training else x, self.weight, self.bias)


class Masked(nn.Conv2d):
    def forward(self, x):
        self.weight.data.mul_(0.5)
        return super().forward(x)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize(("conv", "reason"), [
    (Standardised(4, 4, 3, padding=1), "Standardised computes its kernel from its weight"),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d computes its kernel"),
    (Doubled(4, 4, 3), "no BatchNorm2d follows, but mul|Doubled changes what its convolution returns"),
    (Twice(4, 4, 3, padding=1), "Twice calls F.conv2d 2 times"),
    (ByItsWeight(4, 4, 3), "ByItsWeight prepares its input by its weight or its mode"),
    (ByItsMode(4, 4, 3), "ByItsMode prepares its input by its weight or its mode"),
    (Masked(4, 4, 3), "its weight"),
    (nn.ConvTranspose2d(4, 4, 3), r"0 \(3x3\) stays, ConvTranspose2d is no Conv2d"),
    (nn.Conv2d(4, 4, 9), "only kernel sizes 2, 3, 4, 5, 6 become blocks")])
def test_what_stays_is_told_why(conv, reason):
    with pytest.raises(ValueError, match=f"no convolution of the network can become a block: .*{reason}"):
        replace_convs(nn.Sequential(conv, nn.BatchNorm2d(4)), "dbb", example_input=torch.zeros(1, 4, 12, 12))


def test_a_subclass_whose_stride_depends_on_the_image_says_so():
    class Adaptive(nn.Conv2d):
        def forward(self, x):
            stride = 2 if x.shape[-1] > 12 else 1
            return F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=stride, padding=1)
    net = nn.Sequential(Adaptive(3, 4, 3), nn.BatchNorm2d(4)).eval()
    new, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 8, 8))
    assert new(torch.zeros(1, 3, 10, 10)).shape == (1, 4, 10, 10)
    with pytest.raises(ValueError, match="Adaptive has stride 2, .* exclude this layer"):
        new(torch.zeros(1, 3, 16, 16))
