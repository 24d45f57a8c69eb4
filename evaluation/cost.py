"""What a network costs: parameters, arithmetic, time of an image, activations of a training batch."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

TIMED = 0.3  # seconds that a latency is measured for


@torch.no_grad()
def cost(net: nn.Module, image_size: int) -> dict[str, Any]:
    """Parameters, multiply-accumulates and milliseconds of one image (median, on the network's device)."""
    image = torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        net(image)
    return {"parameters": sum(p.numel() for p in net.parameters()),
            "macs": counter.get_total_flops() // 2,  # the counter takes a multiply-accumulate for two
            "latency_ms": latency_ms(net, image)}


@torch.no_grad()
def latency_ms(net: nn.Module, images: Tensor) -> float:
    """Milliseconds of a forward pass, a median."""
    from torch.utils.benchmark import Timer  # late: it speaks of CUDA, unless settings.cli has silenced it

    timer = Timer("net(images)", globals={"net": net, "images": images}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TIMED).median * 1e3


class Allocations(TorchDispatchMode):
    """Remember the memory that operators return, without keeping it alive; `left` counts what is there."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def left(self) -> int:
        """Bytes of the storages made inside this context that are still alive, the `known` ones left out."""
        made_here = {storage: size for storage, size in self.made.items() if storage not in self.known}
        return sum(size for storage, size in made_here.items() if not storage.expired())


def activation_bytes(net: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training mode leaves for backward, the images included.

    On the CPU, in float32. Measured, not counted from saved-tensor hooks, from which a custom autograd
    function can hide what it keeps.

    Args:
        net: left as it is.
        images: `[N, C, H, W]`.
    """
    net = deepcopy(net).train()
    with Allocations([*net.parameters(), *net.buffers(), images]) as memory:
        logits = net(images)
    return memory.left() + images.nbytes - logits.nbytes


def activations_of_a_batch(net: nn.Module, batch_size: int, image_size: int) -> float:
    """Bytes that a batch of training leaves for backward: `activation_bytes`, of large images with fewer."""
    images = torch.zeros(min(batch_size, 2**21 // image_size**2), 3, image_size, image_size)
    return batch_size / len(images) * activation_bytes(net, images)
