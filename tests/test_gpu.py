"""What only a GPU can check: `make gpu`. Skipped where there is none; run on an H100, 2026-11-26."""

import pytest
import torch

from dbb import branchwise, reparameterize
from evaluation.evaluate import exact_arithmetic
from tests.helpers import TINY, randomize, relative_error, run
from tests.models.networks import EVERY, build, images

no_gpu = not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(no_gpu, reason="needs a CUDA device")]


@EVERY
def test_conversion_on_the_gpu(name, block):
    net = randomize(build(name, block)).cuda()
    x = images(name, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        net.train()(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    net.eval()
    with torch.no_grad(), exact_arithmetic():
        with branchwise(net):
            expected = net(x)
        merged = reparameterize(net)
        assert next(merged.parameters()).is_cuda
        assert relative_error(merged(x), expected) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_synchronised_norms(tmp_path):
    done = run("train.py", "model=resnet20_dbb", *TINY, "trainer.devices=2", "trainer.strategy=ddp",
               "trainer.sync_batchnorm=true", "out=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_images_on_the_device(tmp_path):
    done = run("train.py", "model=resnet20_dbb", *TINY, "trainer.devices=1", "data.on_device=true",
               "data.val_size=50", "out=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
