"""Blocks in place of convolutions that no norm follows: they bring norms of their own."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import convert as convert_script
import models.build
import train as train_script
from dbb import biases, branchwise, fold_norms, reparameterize, replace_convs, restore_norms
from models.wide_resnet import WideResNet
from tests.helpers import TINY, randomize, relative_error


def test_a_network_with_norms_before_its_convolutions():
    """All of its forms compute the same; the plain network gets biases where no norm could hold them."""
    torch.manual_seed(0)
    plain, x = WideResNet(10, 1, 5).double(), torch.randn(4, 3, 8, 8).double()
    assert sum(row.block is not None for row in replace_convs(plain, example_input=x)[1]) == 3
    net, report = replace_convs(plain, example_input=x, without_norm=True)
    alone = [row.module for row in report if row.block is not None and not row.norm]
    assert alone == ["conv1", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"]
    assert "7 of 9 convolutions became blocks" in str(report)
    assert "kxk + 1x1 + 1x1_avg + 1x1_kxk, with norms of its own (conv1, blocks.0.conv2" in str(report)
    randomize(net).eval()
    with branchwise(net):
        wanted = net(x)
    stock = restore_norms(net, report, plain, [x])
    for other in (net, reparameterize(net), fold_norms(net, x), stock):
        assert relative_error(other(x), wanted) < 1e-12
    assert biases(report, plain) == alone
    assert set(stock.state_dict()) - set(plain.state_dict()) == {f"{name}.bias" for name in alone}
    assert biases(report, stock) == []


@pytest.mark.parametrize("init", ["mean", "ones"])
def test_it_starts_as_after_a_new_norm(init):
    """The convolution's own weight and bias are those of the first branch."""
    conv, x = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(8, 3, 6, 6).double()
    net = nn.Sequential(conv, nn.ReLU())
    new, _ = replace_convs(net, ["kxk", "1xk"], example_input=x, without_norm=True, init=init)
    block, factor = new[0], {"mean": 0.5, "ones": 1.0}[init]
    weight = block.branches["kxk"].weight + nn.functional.pad(block.branches["1xk"].weight, (0, 0, 1, 1))
    wanted = nn.functional.conv2d(x, weight, padding=1) * factor / (1 + 1e-5) ** 0.5
    assert torch.equal(block.branches["kxk"].weight, conv.weight)
    assert relative_error(new.eval()(x), (wanted + conv.bias[:, None, None]).relu()) < 1e-12
    mean = block.train()(x).mean((0, 2, 3))
    assert relative_error(mean, conv.bias) < 1e-12


def test_what_stays_plain_all_the_same():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.hooked, self.free = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.hooked.register_forward_hook(lambda *args: None)
            self.hidden = [self.shared]

        def forward(self, x):
            return self.free(self.hooked(self.shared(x)))
    _, report = replace_convs(Twice(), example_input=torch.zeros(1, 3, 8, 8), without_norm=True)
    assert {row.module: row.block is not None for row in report} == {
        "shared": False, "hooked": False, "free": True}


def test_a_warm_start_needs_the_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="0: init=single, a warm start, needs the norm that follows"):
        replace_convs(net, example_input=torch.zeros(1, 3, 8, 8), without_norm=True, init="single")


@pytest.mark.slow
def test_from_training_to_the_file(make_settings, tmp_path, monkeypatch, capsys):
    for known in (models.build.UNTRAINED, models.build.BACKBONES):
        monkeypatch.setitem(known, "wrn10_1", (WideResNet, 10, 1))
    settings = make_settings("model=wrn16_8", "model.name=wrn10_1", "block=dbb", "block.without_norm=true",
                             *TINY)
    assert train_script.train(settings, tmp_path)["predictions_changed"] == 0
    ckpt = f"ckpt={tmp_path}/checkpoints/last.ckpt"
    report = convert_script.convert(make_settings(ckpt, config_name="convert"), tmp_path / "out")
    assert report["biases"] == ["conv1", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"]
    assert [entry["predictions_changed"] for entry in report["files"].values()] == [0, 0]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "wrn10_1 with a bias in convolutions that have none there (conv1 and 3 more)" in page
    code = page.split("```python\n")[1].split("```")[0].replace("from wide_resnet", "from models.wide_resnet")
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code, names)
    assert names["net"].state_dict().keys() == load_file("model.safetensors").keys()
    with pytest.raises(ValueError, match="hub=true"):
        convert_script.convert(make_settings(ckpt, "hub=true", config_name="convert"), tmp_path / "hub")


