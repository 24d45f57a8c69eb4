"""Weight files that others published, under the names of our networks.

A published network is a list of units, a unit being a convolution and all that belongs to it
(`stage1.0.conv1`). Each stands for one convolution and norm of ours; which tensors stand under its prefix
tells what it is. Layouts as in the authors' repositories DingXiaoH/DiverseBranchBlock, DingXiaoH/ACNet and
JUGGHM/OREPA_CVPR2022.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.transforms import embed_kernel, merge_1x1_kxk
from models.weights import refuse_kinds

RESNETS = ("resnet18", "resnet34", "resnet50")
NETWORKS = {"dbb": (*RESNETS, "mobilenet_v1"), "acnet": ("resnet18", "resnet34", "vgg16"), "orepa": RESNETS}
SOURCES = tuple(NETWORKS)
DEPLOYED = ("conv", "dbb_reparam", "fused_conv", "orepa_reparam", "or1x1_reparam", "or_large_reparam")
NAMES = {  # a unit's tensors and norms: a pair's, ACNet's, DBB's
    "conv.weight": "conv.weight", "bn": "norm",
    "square_conv.weight": "conv.branches.kxk.weight", "square_bn": "conv.branches.kxk.bn",
    "ver_conv.weight": "conv.branches.kx1.weight", "ver_bn": "conv.branches.kx1.bn",
    "hor_conv.weight": "conv.branches.1xk.weight", "hor_bn": "conv.branches.1xk.bn",
    "dbb_origin.conv.weight": "conv.branches.kxk.weight", "dbb_origin.bn": "conv.branches.kxk.bn",
    "dbb_1x1.conv.weight": "conv.branches.1x1.weight", "dbb_1x1.bn": "conv.branches.1x1.bn",
    "dbb_avg.conv.weight": "conv.branches.1x1_avg.first", "dbb_avg.bn": "conv.branches.1x1_avg.inner",
    "dbb_avg.avgbn": "conv.branches.1x1_avg.bn",
    "dbb_1x1_kxk.idconv1.weight": "conv.branches.1x1_kxk.first",
    "dbb_1x1_kxk.conv1.weight": "conv.branches.1x1_kxk.first",
    "dbb_1x1_kxk.bn1": "conv.branches.1x1_kxk.inner",
    "dbb_1x1_kxk.conv2.weight": "conv.branches.1x1_kxk.second",
    "dbb_1x1_kxk.bn2": "conv.branches.1x1_kxk.bn",
}


def translate(weights: dict[str, Tensor], source: str, name: str,
              net: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """Rename published weights to those of our network; keys that no rule knows keep their names.

    Args:
        weights: from `models.reading.read_weights`.
        source: one of `SOURCES`.
        name: the backbone's name in `models.BACKBONES`.
        net: that backbone, with plain convolutions.

    Returns:
        The weights, and whether they are those of the network with blocks; else they are of the plain one.

    Raises:
        ValueError: if there is no layout of that name, a unit lacks a tensor or does not fit together, or
            a tensor is not of real numbers.
    """
    if name not in NETWORKS.get(source, ()):
        raise ValueError(f"source={source} has no layout for model.name={name}; there are "
                         + "; ".join(f"{other}: {', '.join(names)}" for other, names in NETWORKS.items()))
    refuse_kinds(weights, {key: torch.empty(0) for key, value in weights.items() if value.ndim})
    modules, rest, result = dict(net.named_modules()), dict(weights), {}
    convs, norms, heads = ([key for key, module in modules.items() if isinstance(module, kind)]
                           for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    for unit, conv, norm in zip(_units(source, name, convs), convs, norms, strict=True):
        prefix = f"{unit}.acb." if any(key.startswith(f"{unit}.acb.") for key in rest) else f"{unit}."
        u = {key.removeprefix(prefix): rest.pop(key) for key in list(rest) if key.startswith(prefix)}
        try:
            layer = _layer(u, modules[conv], modules[norm].eps)
        except KeyError as error:
            raise ValueError(f"{prefix}* lacks {error.args[0]}: the file is cut, or not {source}'s "
                             f"{name}") from error
        except (RuntimeError, IndexError, ValueError) as error:  # what torch's operators raise on odd shapes
            raise ValueError(f"the tensors of {prefix}* do not fit together: the file is not {source}'s "
                             f"{name}; OREPA's units with groups (ResNeXt) are not read") from error
        ours = {"conv": conv, "norm": norm}
        result |= {ours[key[:4]] + key[4:]: value for key, value in layer.items()}
        rest |= {prefix + key: value for key, value in u.items()}
    linears = ["linear1", "linear2"] if name == "vgg16" else ["linear"]
    for head, theirs in zip(heads, linears, strict=True):
        found = [leaf for leaf in ("weight", "bias") if f"{theirs}.{leaf}" in rest]
        result |= {f"{head}.{leaf}": rest.pop(f"{theirs}.{leaf}") for leaf in found}
    if twice := sorted(rest.keys() & result.keys()):
        raise ValueError(f"the file has {twice[0]}, and the same under {source}'s name: save those of one "
                         "network alone")
    return rest | result, any(".branches." in key for key in result)


def _units(source: str, name: str, convs: list[str]) -> list[str]:
    """The published names of our convolutions, in order."""
    if name == "vgg16":
        return [f"stem.conv{i + 1}" for i in range(len(convs))]
    if name == "mobilenet_v1":
        layers = ("depthwise", "pointwise")
        return ["conv1", *(f"stem.{k}.{layer}" for k in range(len(convs) // 2) for layer in layers)]
    stem = "conv1" if source == "acnet" else "stage0.conv1"
    return [stem, *(conv.replace("layer", "stage").replace("downsample.0", "shortcut") for conv in convs[1:])]


def _layer(u: dict[str, Tensor], conv: nn.Conv2d, eps: float) -> dict[str, Tensor]:
    """Take what is known out of a unit: a pair (`conv.weight`, `norm.*`) or a block (`conv.branches.*`)."""
    layer = {}
    for part in DEPLOYED:
        if f"{part}.bias" in u:  # a norm that only adds the bias: gamma / sqrt(1 + eps) is 1
            bias = u.pop(f"{part}.bias")
            layer = {"conv.weight": u.pop(f"{part}.weight"),
                     "norm.weight": torch.full_like(bias, (1 + eps) ** 0.5), "norm.bias": bias,
                     "norm.running_mean": torch.zeros_like(bias), "norm.running_var": torch.ones_like(bias)}
            break
    for sign, kernel in OREPA.items():
        if sign in u:
            dtype = u[sign].dtype
            # Without values first: tensors that do not fit together may make large ones.
            made = kernel({key: value.to("meta") for key, value in u.items()})
            if made.shape != conv.weight.shape:
                raise ValueError(f"their kernel is {list(made.shape)}, not {list(conv.weight.shape)}")
            layer["conv.weight"] = kernel(u).to(dtype)
    for theirs, ours in NAMES.items():
        if conv.groups == conv.out_channels:
            ours = ours.replace("1x1_avg", "avg")
        for key in [key for key in u if key == theirs or key.startswith(f"{theirs}.")]:
            # The newer layout has a norm inside the padding one. A second tensor for the same name, such as a
            # norm behind a bias, is left over as unexpected.
            target = ours + key.removeprefix(theirs).removeprefix(".bn")
            if target not in layer:
                layer[target] = u.pop(key)
    for key in [key for key in layer if key.endswith(".running_var")]:  # old PyTorch did not count batches
        layer.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    for branch in [key.removesuffix("inner.weight") for key in layer if key.endswith("inner.weight")]:
        _drop_shift(layer, branch, conv.groups, eps)
    return layer


def _drop_shift(layer: dict[str, Tensor], branch: str, groups: int, eps: float) -> None:
    """Turn the inner norm of a DBB's two-layer branch into our Scale.

    It pads the map between the layers with the inner norm's shift, which so adds a constant to the map that
    the outer norm sees: second, summed over its taps, times the shift. Without a shift, the outer norm's mean
    is less by that.
    """
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    inner = {leaf: layer.pop(f"{branch}inner.{leaf}") for leaf in leaves}
    mean = layer[f"{branch}bn.running_mean"]
    if {inner[leaf].shape for leaf in leaves[:4]} != {(inner["weight"].numel(),)}:  # which might broadcast
        raise ValueError("a norm's values are not one for each channel")
    constant = _shift(**{leaf: value.double() for leaf, value in inner.items()}, eps=eps)
    if f"{branch}second" in layer:  # the average's taps add up to 1
        taps = layer[f"{branch}second"].double().sum((2, 3)).unflatten(0, (groups, -1))  # [G, O/G, M/G]
        constant = torch.einsum("gom,gm->go", taps, constant.unflatten(0, (groups, -1))).flatten()
    if mean.shape != constant.shape:
        raise ValueError("a norm's mean is not one value for each channel")
    layer |= {f"{branch}bn.running_mean": (mean.double() - constant).to(mean.dtype),
              f"{branch}scale.weight": inner["weight"], f"{branch}scale.running_var": inner["running_var"]}


def _shift(weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
           **_) -> Tensor:
    """A norm's value of zero, `[M]`."""
    return bias - running_mean * weight / (running_var + eps).sqrt()


def _orepa(u: dict[str, Tensor], prefix: str = "") -> Tensor:
    """The kernel `[O, I, K, K]` in float64 of an OREPA unit, as its `weight_gen` makes it.

    Six kernels, each times a factor per output.
    """
    names = ("origin", "avg_conv", "avg_avg", "pfir_conv", "prior", "1x1_kxk_idconv1", "1x1_kxk_conv2", "1x1",
             "gconv_dw", "gconv_pw")
    origin, *kernels = [u.pop(f"{prefix}weight_orepa_{name}").double() for name in names]
    average, box, pfir, prior, first, second, pointwise, dw, pw = kernels
    identity, vector = u.pop(f"{prefix}id_tensor").double(), u.pop(f"{prefix}vector").double()
    inputs = (origin.shape[1], -1)
    dw, pw = dw.squeeze(1).unflatten(0, inputs), pw.flatten(1).unflatten(1, inputs)
    gconv = torch.einsum("ithw,oit->oihw", dw, pw)
    kernels = [origin, average * box, pfir * prior[:, None], merge_1x1_kxk(first + identity, second)[0],
               embed_kernel(pointwise, origin.shape[2:]), gconv]
    return torch.einsum("bo,boihw->oihw", vector, torch.stack(kernels))


def _orepa_1x1(u: dict[str, Tensor]) -> Tensor:
    """The kernel `[O, I, 1, 1]` in float64 of an OREPA_1x1 unit: one kernel, and two in a row."""
    names = ("origin", "l2i_conv1", "l2i_conv2")
    origin, first, second = (u.pop(f"weight_or1x1_{name}").double() for name in names)
    kernels = torch.stack([origin, merge_1x1_kxk(first, second)[0]])
    return torch.einsum("bo,boihw->oihw", u.pop("vector").double(), kernels)


def _orepa_large(u: dict[str, Tensor]) -> Tensor:
    """The kernel `[O, I, 7, 7]` in float64 of OREPA_LargeConv: three 3x3, correlated as by `weight_gen`."""
    kernels = [u.pop(f"weight{i}").double() if f"weight{i}" in u else _orepa(u, f"weight{i}.")
               for i in range(3)]
    kernel = kernels[0].transpose(0, 1)
    for following in kernels[1:]:
        kernel = F.conv2d(kernel, following, padding=2)
    return kernel.transpose(0, 1)


OREPA = {"weight_orepa_origin": _orepa, "weight_or1x1_origin": _orepa_1x1, "weight0": _orepa_large,
         "weight0.weight_orepa_origin": _orepa_large}  # the tensor by which a kind of unit is known
