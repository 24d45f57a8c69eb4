"""Two processes against one with the joined batch: gradients under DDP, statistics over all processes."""

import copy
from itertools import product

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from dbb import MODES
from tests.dbb.blocks import SHAPES, make
from tests.helpers import relative_error

pytestmark = pytest.mark.slow

CASES = list(product(MODES, SHAPES, ["local", "synchronised", "synchronised, one without images"]))
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch's own SyncBatchNorm needs a GPU a process: two GPUs")]


class Synchronised(nn.SyncBatchNorm):
    """Torch's own refuses tensors on the CPU."""

    def forward(self, x):
        if not self.training:
            running = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, *running, self.weight, self.bias, eps=self.eps)
        n = all_reduce(x.new_tensor(x.numel() // x.shape[1]))
        mean = all_reduce(x.sum((0, 2, 3))) / n
        var = all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var * n / (n - 1) - self.running_var)
        factor = self.weight / (var + self.eps).sqrt()
        return (x - mean[:, None, None]) * factor[:, None, None] + self.bias[:, None, None]


def step(block, x, cotangent):
    """Output, gradients of (output * cotangent).sum(), and state after one training step."""
    x = x.clone().requires_grad_()
    y = block(x)
    (y * cotangent).sum().backward()
    inner = getattr(block, "module", block)
    return {"y": y.detach(), "x": x.grad, **{f"d {name}": p.grad for name, p in inner.named_parameters()},
            **{name: value for name, value in inner.state_dict().items() if "running" in name}}


def case(mode, shape):
    block, x = make(mode, SHAPES[shape], images=8)
    return block, x, torch.randn(8, 8, 9, 8, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def shares_of(norms, x):
    """The number of images of either process."""
    return [len(x), 0] if "without" in norms else [len(x) // 2] * 2


def process(rank, folder, device):
    """Run every case as one of two processes: on the CPU, or on a GPU with torch's own synchronised norms."""
    device, backend = (f"cuda:{rank}", "nccl") if device == "cuda" else ("cpu", "gloo")
    distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for mode, shape, norms in CASES:
        block, x, cotangent = case(mode, shape)
        shares = shares_of(norms, x)
        block.positions = block.positions * shares[0] // len(x)  # together the sample of the joined batch
        parallel = DistributedDataParallel(block.to(device))
        if norms != "local":  # behind the back of DDP, which refuses them on the CPU
            for module in nn.SyncBatchNorm.convert_sync_batchnorm(block).modules():
                if isinstance(module, nn.SyncBatchNorm) and device == "cpu":
                    module.__class__ = Synchronised
        found = step(parallel, x.split(shares)[rank].to(device), cotangent.split(shares)[rank].to(device))
        results.append({key: value.cpu() for key, value in found.items()})
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (str(folder), request.param), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return {key: (a, b) for key, a, b in zip(CASES, first, second, strict=True)}


@pytest.mark.parametrize(("mode", "shape", "norms"), CASES)
def test_two_processes(mode, shape, norms, processes):
    block, x, cotangent = case(mode, shape)
    first, second = processes[mode, shape, norms]
    if norms != "local":
        expected = step(block, x, cotangent)
        for key in ("y", "x"):
            assert relative_error(torch.cat([first[key], second[key]]), expected[key]) < 1e-10
    else:  # every process on its own, gradients averaged
        block.positions //= 2
        halves = zip(x.chunk(2), cotangent.chunk(2), strict=True)
        expected, other = (step(copy.deepcopy(block), *half) for half in halves)
        expected |= {key: expected[key] + other[key] for key in expected if key.startswith("d ")}
        assert relative_error(second["y"], other["y"]) < 1e-12
    names = [key for key in expected if key.startswith("d ")]
    here, there, wanted = (torch.cat([found[name].flatten() for name in names])
                           for found in (first, second, expected))
    assert torch.equal(here, there)
    assert relative_error(2 * here, wanted) < 1e-10
    for key in expected:
        if "running" in key:
            assert relative_error(first[key], expected[key]) < 1e-12, key
