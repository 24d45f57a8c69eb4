"""A second device that is really the CPU: its tensors may not meet the CPU's, as on a machine with a GPU.

Every operator of torch runs, forward and backward. Made for a process of its own (`test_devices.py`): once
this is imported, torch has an accelerator called `elsewhere`.
"""

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils import backend_registration
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("elsewhere", Backend())
ELSEWHERE = torch.device("elsewhere:0")
COPIES = ("_to_copy", "copy_")  # from one device to another


class Elsewhere(torch.Tensor):
    """A tensor of the second device, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=ELSEWHERE)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = Elsewhere(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)  # in a checkpoint as any tensor


def run(func, args, kwargs):
    """Run an operator on what is inside."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    indexed = name == "index" and isinstance(args[0], Elsewhere)  # places to look at may lie on the CPU
    if here and there and name not in COPIES and not indexed:
        raise RuntimeError(f"{func}: all tensors must be on one device, not elsewhere and {here[0].device}")
    device, kwargs = kwargs.get("device"), {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.inner, (args, kwargs))
    with _disable_current_modes():
        out = func(*args, **kwargs)
    if torch.device(device or ELSEWHERE).type != "elsewhere" or (device is None and not there):
        return out
    # What an operator has changed in place is the same tensor as before.
    return tree_map_only(torch.Tensor, lambda t: there[id(t)] if id(t) in there else Elsewhere(t), out)


FACTORIES = torch.library.Library("_", "IMPL")
FACTORIES.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
ATEN = torch.library.Library("aten", "IMPL")  # torch.tensor(data, device=...) reaches no fallback
for operator in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
                 torch.ops.aten.copy_.default):
    ATEN.impl(operator, lambda *args, operator=operator, **kwargs: run(operator, args, kwargs), "PrivateUse1")


@pytest.fixture
def scripts_elsewhere(monkeypatch):
    """Lightning trains on the second device, which it does not know."""
    plain = SingleDeviceStrategy.__init__
    monkeypatch.setattr(SingleDeviceStrategy, "__init__",
                        lambda self, device, *args, **kwargs: plain(self, ELSEWHERE, *args, **kwargs))
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)  # nothing is ever under way
