"""The six transformations of the Diverse Branch Block (CVPR 2021, section 3.2) as pure functions.

Shapes: O output channels, I input channels, M internal channels, G groups, KH x KW kernel. A convolution's
kernel is `[O, I/G, KH, KW]`, its bias `[O]`. Every function keeps the float type and device of its arguments,
is differentiable, and holds for any stride, padding and dilation: none of them enters the formulas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dbb.moments import without_autocast


@torch.no_grad()
def fill(target: Tensor, value: Tensor, name: str) -> None:
    """Copy values into a tensor, perhaps of a narrower type.

    Raises:
        ValueError: with the name, if a finite value is infinite in that type.
    """
    target.copy_(value)
    if torch.finfo(target.dtype).max < torch.finfo(value.dtype).max:
        lost = value.isfinite() & ~target.to(value.device).isfinite()
        if not lost.is_meta and lost.any():
            way_out = "the training has diverged" if target.dtype == torch.float32 else \
                "convert the network to float32 first"
            raise ValueError(f"{name} has the value {value[lost][0].item():.6g}, which {target.dtype} cannot "
                             f"hold: {way_out}")


def fuse_conv_norm(kernel: Tensor, bias: Tensor | float, mean: Tensor, var: Tensor, weight: Tensor,
                   beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Transform I: a convolution followed by a BatchNorm with fixed statistics is a convolution.

    The convolution has the kernel `[O, I/G, KH, KW]` and the bias `[O]`, or 0; the norm mean, variance, gamma
    and bias `[O]`, and an epsilon. Returns kernel and bias.
    """
    scale, shift = norm_affine(mean, var, weight, beta, eps)
    return kernel * scale[:, None, None, None], shift + bias * scale


def norm_affine(mean: Tensor, var: Tensor, weight: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What a BatchNorm with fixed statistics multiplies with, and what it adds; see `fuse_conv_norm`."""
    scale = weight / (var + eps).sqrt()
    return scale, beta - mean * scale


def add_branches(kernels: Sequence[Tensor], biases: Sequence[Tensor],
                 kernel_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Transforms II and VI: the sum of convolutions is one convolution, centre taps on centre taps.

    Their kernels `[O, I/G, h, w]` may be smaller than the sum's `kernel_size`; their biases are `[O]` each.
    """
    embedded = [embed_kernel(kernel, kernel_size) for kernel in kernels]
    return sum(embedded[1:], embedded[0]), sum(biases[1:], biases[0])


def merge_1x1_kxk(first: Tensor, second: Tensor, groups: int = 1, first_bias: Tensor | None = None,
                  second_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Transform III: a 1x1 convolution, then a KxK one, is one KxK convolution.

    With `first_bias` this holds only if the map in between is padded with that bias (paper, section 3.2).

    Args:
        first: `[M, I/G, 1, 1]`.
        second: `[O, M/G, KH, KW]`.
        groups: of both.
        first_bias: `[M]` or None.
        second_bias: `[O]` or None.

    Returns:
        Kernel `[O, I/G, KH, KW]` and bias `[O]`, None if both biases are.
    """
    # The 1x1 kernel runs over KxK ones as over images: few operators, forward and backward.
    images, points = second, first.transpose(0, 1)
    if groups > 1:
        images = second.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # [O/G, M, KH, KW]
        points = first.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [I, M/G, 1, 1]
    with without_autocast(first.device):
        kernel = F.conv2d(images, points, groups=groups)
    if groups > 1:
        kernel = kernel.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    if first_bias is None:
        return kernel, second_bias
    grouped = second.unflatten(0, (groups, -1))
    bias = torch.einsum("gomhw,gm->go", grouped, first_bias.reshape(groups, -1)).flatten()
    return kernel, bias if second_bias is None else bias + second_bias


def concat(kernels: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Transform IV: the depth concatenation of convolutions is a convolution with concatenated outputs."""
    return torch.cat(list(kernels)), torch.cat(list(biases))


def average_kernel(channels: int, kernel_size: tuple[int, int], groups: int = 1,
                   dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Transform V: average pooling (padding counted) is a convolution, `[C, C/G, KH, KW]`."""
    box = torch.full((1, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]), dtype=dtype, device=device)
    if groups == channels:
        return box.expand(channels, -1, -1, -1)
    return identity_kernel(channels, groups, dtype, device) * box


def identity_kernel(channels: int, groups: int = 1, dtype: torch.dtype | None = None,
                    device: torch.device | None = None) -> Tensor:
    """The 1x1 kernel that changes nothing, an identity matrix within each group: `[C, C/G, 1, 1]`."""
    eye = torch.eye(channels // groups, dtype=dtype, device=device)
    return eye.expand(groups, -1, -1).flatten(0, 1)[:, :, None, None]


def embed_kernel(kernel: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Transform VI: a smaller kernel `[O, I/G, h, w]` is a KH x KW kernel with zeros around it.

    Its own centre tap comes to lie on the centre tap `(K - 1) // 2` of the large one, in each direction.
    """
    if kernel.shape[2:] == tuple(kernel_size):
        return kernel
    top, left = offsets(kernel.shape[2:], kernel_size)
    bottom, right = kernel_size[0] - kernel.shape[2] - top, kernel_size[1] - kernel.shape[3] - left
    return F.pad(kernel, (left, right, top, bottom))  # F.pad counts from the last dimension: W before H


def offsets(small: Sequence[int], large: Sequence[int]) -> list[int]:
    """Row and column of a small kernel's first tap inside a large one, centre tap on centre tap.

    Raises:
        ValueError: if the small one is larger.
    """
    if any(k_small > k_large for k_small, k_large in zip(small, large, strict=True)):
        raise ValueError(f"a branch's kernel of {tuple(small)} is larger than the block's of {tuple(large)}")
    return [(k_large - 1) // 2 - (k_small - 1) // 2 for k_small, k_large in zip(small, large, strict=True)]
