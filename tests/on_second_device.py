"""What must hold where a network is not on the CPU; run by `test_devices.py`, in a process of its own."""

import copy
from functools import partial

import pytest
import torch

from dbb import (
    AsymmetricConvBlock,
    DiverseBranchBlock,
    OnlineReparamBlock,
    ReparamConv2d,
    branchwise,
    reparameterize,
    replace_convs,
)
from evaluation.evaluate import pick_device
from tests.helpers import EVERY_BRANCH, TINY, call, pair, randomize, relative_error
from tests.models.networks import build, images
from tests.second_device import ELSEWHERE, scripts_elsewhere

__all__ = ["scripts_elsewhere"]
BLOCKS = {"exact": DiverseBranchBlock, "online": partial(DiverseBranchBlock, mode="online", positions=64),
          "acb": AsymmetricConvBlock, "linear": OnlineReparamBlock,
          "every branch": partial(ReparamConv2d, branches=EVERY_BRANCH)}


def test_two_devices_do_not_meet():
    with pytest.raises(RuntimeError, match="all tensors must be on one device"):
        torch.ones(3) + torch.ones(3, device=ELSEWHERE)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("groups", [1, 8])
def test_a_block_trains_and_converts_there(kind, groups):
    here = randomize(BLOCKS[kind](8, 8, 3, padding=1, groups=groups))
    there, x = copy.deepcopy(here).to(ELSEWHERE), torch.randn(6, 8, 12, 12)
    outputs = {}
    for block, image in ((here, x.clone()), (there, x.to(ELSEWHERE))):
        y = block(image.requires_grad_())
        y.square().mean().backward()
        outputs[block] = [y, image.grad, *[p.grad for p in block.parameters()], *block.buffers()]
    for mine, its in zip(outputs[there], outputs[here], strict=True):
        assert mine.device == ELSEWHERE
        assert torch.equal(mine.cpu(), its)
    there.eval()
    with torch.no_grad():
        with branchwise(there):
            expected = there(x.to(ELSEWHERE)).cpu()
        merged = reparameterize(there)
        assert relative_error(merged(x.to(ELSEWHERE)).cpu(), expected) < 1e-5


def test_blocks_are_put_in_there():
    net = torch.nn.Sequential(pair(), pair()).to(ELSEWHERE)
    net, _ = replace_convs(net, DiverseBranchBlock, example_input=torch.randn(2, 8, 9, 9, device=ELSEWHERE))
    assert {tensor.device for tensor in net.state_dict().values()} == {ELSEWHERE}


@pytest.mark.parametrize("name", ["resnet8", "vgg16_narrow", "cifar_quick", "airbench", "mobilenet_v2"])
def test_a_network_runs_there(name):
    net = build(name).to(ELSEWHERE)
    assert net(images(name, device=ELSEWHERE)).shape == (2, 10)


@pytest.mark.usefixtures("scripts_elsewhere")
def test_the_scripts_run_there(tmp_path):
    assert pick_device("auto").type == "elsewhere"
    done = call("train.py", "model=resnet8", "block=dbb_online", *TINY, "optim.ema_decay=0.9",
                "data.mixup=0.2", "data.on_device=true", "data.max_images=128", "out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on elsewhere" in done.stdout
    ckpt = "ckpt=run/checkpoints/last.ckpt"
    for command in (("convert.py", ckpt), ("train.py", ckpt, "trainer.max_epochs=2")):
        done = call(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
