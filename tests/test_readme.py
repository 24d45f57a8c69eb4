"""The examples in the README run."""

import re
from pathlib import Path

import torch

import dbb
from models import build_model
from tests.conftest import ROOT, randomize, relative_error

BLOCKS = re.findall(r"```python\n(.*?)```", Path(ROOT, "README.md").read_text(), re.DOTALL)


def test_stock_networks_for_small_images(monkeypatch):
    monkeypatch.syspath_prepend(Path(ROOT, "models"))
    parts, namespace = BLOCKS[0].split("\n\n"), {}
    for part, name in zip(parts, ("resnet18", "mobilenet_v1", "resnet20"), strict=True):
        exec(part, namespace)
        ours = build_model(name, 10, image_size=32)
        namespace["net"].load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(namespace["net"].eval()(x), ours.eval()(x))


def test_library_in_plain_pytorch(capsys):
    namespace = {}
    exec(BLOCKS[1], namespace)
    assert "16 of 20 convolutions became blocks" in capsys.readouterr().out


def test_worked_example_of_a_branch():
    import textwrap
    exec(textwrap.dedent(BLOCKS[2]), {"dbb": dbb, "torch": torch})
    block = dbb.ReparamConv2d(4, 6, (3, 5), padding=(1, 2), groups=2, branches=("kxk", "row"), dtype=torch.float64)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    block.train()(x).square().sum().backward()
    assert block.branches["row"].gain.grad is not None
    randomize(block).eval()
    with torch.no_grad(), dbb.branchwise(block):
        assert relative_error(block.fuse()(x), block(x)) < 1e-12
