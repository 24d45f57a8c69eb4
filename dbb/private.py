"""The parts of torch that are needed here and have no public name: if torch moves them, change this file."""

from torch._C import DisableTorchFunctionSubclass  # operators return plain tensors
from torch._C import _is_any_autocast_enabled as any_autocast_enabled  # on any device, and quick to ask
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # of any dimension, synchronised or not
from torch.nn.modules.batchnorm import _NormBase as AnyNorm  # InstanceNorm too
from torch.nn.modules.conv import _ConvNd as AnyConv  # of any dimension
from torch.nn.modules.utils import _pair as pair  # one number as (height, width), as convolutions read it
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operator below autograd
from torch.utils._pytree import tree_leaves  # the tensors in nested containers

__all__ = ["AnyBatchNorm", "AnyConv", "AnyNorm", "DisableTorchFunctionSubclass", "TorchDispatchMode",
           "any_autocast_enabled", "pair", "tree_leaves"]
