"""Which convolutions become blocks, family by family: writes docs/families.md.

    python tools/families.py

For every network: put blocks in with init="single" and compare with the original in eval (same function, so
nothing was lost on the way). Then randomise all norms, convert, and compare with the branches. float64, two
random images.
"""

import platform
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dbb import NothingSwappedError, ReparamConv2d, Report, branchwise, reparameterize, replace_convs
from tests.helpers import randomize, relative_error

TIMM = ["resnet18", "resnet50d", "resnext26ts", "seresnet18", "res2net50_14w_8s", "resnest14d", "skresnet18",
        "ecaresnet26t", "regnetx_002", "regnety_002", "regnetz_005", "densenet121", "vgg11", "vgg11_bn",
        "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small",
        "tf_mobilenetv3_small_100", "efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0",
        "mnasnet_small", "fbnetc_100", "spnasnet_100", "tinynet_e", "lcnet_050", "mixnet_s", "hardcorenas_a",
        "convnext_atto", "hrnet_w18_small", "dla34", "dla46x_c", "ghostnet_050", "ghostnetv2_100",
        "repvgg_a0", "repghostnet_050", "mobileone_s0", "repvit_m0_9", "fastvit_t8", "inception_v3",
        "inception_v4", "inception_resnet_v2", "xception41", "cspresnet50", "cspdarknet53", "darknet17",
        "dm_nfnet_f0", "nf_regnet_b0", "resnetv2_50", "resnetv2_50x1_bit", "rexnet_100", "selecsls42b",
        "ese_vovnet19b_dw", "dpn48b", "hgnetv2_b0", "starnet_s1", "efficientvit_b0", "efficientformer_l1",
        "levit_conv_128s", "mobilevit_xxs", "edgenext_xx_small", "semnasnet_075", "vit_tiny_patch16_224"]
TORCHVISION = ["alexnet", "vgg11", "vgg11_bn", "resnet18", "wide_resnet50_2", "resnext50_32x4d",
               "densenet121", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
               "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_0", "convnext_tiny"]
IMAGE_SIZE = {"vit_tiny_patch16_224": 224, "levit_conv_128s": 224, "efficientformer_l1": 224}
HEAD = """\
# Which convolutions become blocks

Written by `python tools/families.py`. A convolution becomes a block if its kernel size is 2 to 6 and a
BatchNorm alone reads its output. *Same function*: relative difference, in eval, between the original network
and the one with blocks and `init="single"`. *After conversion*: relative difference between the network run
branch by branch and the converted one, with random statistics in all norms. All in float64; rounding grows
with depth, most in networks that multiply feature maps.
"""


class Finding(NamedTuple):
    """What became of one network; the errors are None where nothing could become a block."""

    swapped: int
    convolutions: int
    reasons: dict[str, int]
    same_function: float | None
    after_conversion: float | None


def build(library: str, name: str) -> nn.Module:
    """A randomised network of timm or torchvision in eval, float64."""
    torch.manual_seed(0)
    if library == "timm":
        narrow = {"mlp_ratio": 1 / 64} if name.startswith("vgg") else {}
        net = timm.create_model(name, num_classes=5, **narrow)
    else:
        init = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # slow
        net = torchvision.models.get_model(name, weights=None, num_classes=5, **init)
    return randomize(net.double().eval())


@torch.no_grad()
def examine(library: str, name: str) -> Finding:
    """Put blocks in, compare, convert, compare.

    Raises:
        AssertionError: if the converted network has other names or shapes than the original, but for biases.
    """
    net = build(library, name)
    size = IMAGE_SIZE.get(name, 96)
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = net(x)
    try:
        new, report = replace_convs(net, "dbb", example_input=x, init="single")
    except NothingSwappedError as error:
        return Finding(0, len(error.report), reasons(error.report), None, None)
    same = relative_error(new(x), expected)
    randomize(new)
    with branchwise(new):
        drawn = new(x)
    merged = reparameterize(new)
    assert drawn.shape == expected.shape
    assert not any(isinstance(module, ReparamConv2d) for module in merged.modules())
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    biases = {f"{row.module}.bias" for row in report if row.block}
    differing = {k for k, v in merged.state_dict().items() if shapes.get(k) != v.shape}
    assert differing == biases - shapes.keys(), "names and shapes are the old ones, with biases"
    swapped = sum(row.block is not None for row in report)
    return Finding(swapped, len(report), reasons(report), same, relative_error(merged(x), drawn))


def reasons(report: Report) -> dict[str, int]:
    """How many stayed for which reason, names of modules left out."""
    short = {"only kernel sizes": "kernel size", "no BatchNorm2d follows": "no BatchNorm follows"}
    found = Counter()
    for row in report:
        if row.block is None:
            texts = [text for start, text in short.items() if row.reason.startswith(start)]
            found[texts[0] if texts else row.reason] += 1
    return dict(found.most_common())


def main() -> None:
    libraries = (timm, torchvision, torch)
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    lines = [HEAD, f"{versions}, {platform.machine()} CPU", "",
             "| library | network | become blocks | stay plain, and why | same function | after conversion |",
             "|---|---|---|---|---|---|"]
    for library, names in (("timm", TIMM), ("torchvision", TORCHVISION)):
        for name in names:
            finding = examine(library, name)
            stay = ", ".join(f"{count} {reason}" for reason, count in finding.reasons.items())
            errors = ["-" if error is None else f"{error:.0e}"
                      for error in (finding.same_function, finding.after_conversion)]
            swapped = f"{finding.swapped} of {finding.convolutions}"
            lines.append(f"| {library} | {name} | {swapped} | {stay} | {errors[0]} | {errors[1]} |")
            print(lines[-1], flush=True)
    Path(__file__).parent.with_name("docs").joinpath("families.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
