"""The lines that rebuild a plain network without this repository."""

from collections.abc import Sequence

from models.build import OF_TIMM, SMALL_IMAGE, UNTRAINED, timms_name

SMALL_STEM = {
    "resnet": ["net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
               "net.maxpool = torch.nn.Identity()"],
    "mobilenet": ["for conv in [m for m in net.modules() if getattr(m, 'stride', None) == (2, 2)][:2]:",
                  "    conv.stride = (1, 1)"],
}


def of_timm(name: str, image_size: int) -> tuple[str, dict] | None:
    """Name and arguments under which timm builds a network unchanged.

    None if it does not: small images, our own networks.
    """
    if name in UNTRAINED or (name in OF_TIMM and image_size <= SMALL_IMAGE):
        return None
    return timms_name(name)


def recipe(name: str, num_classes: int, image_size: int, biases: Sequence[str] = ()) -> str:
    """Python that builds `net`, with model.safetensors' keys and shapes, from timm or one file of `models/`.

    Args:
        name: see `models.build_model`; the same for the next two.
        num_classes: see there.
        image_size: see there.
        biases: convolutions that have a bias, which the plain network has not.
    """
    if biases:
        return "\n".join([recipe(name, num_classes, image_size), "import torch",
                          f"for name in {list(biases)}:", "    conv = net.get_submodule(name)",
                          "    conv.bias = torch.nn.Parameter(torch.zeros(conv.out_channels))"])
    if name in UNTRAINED:
        network, *arguments = UNTRAINED[name]
        module = network.__module__.removeprefix("models.")
        arguments = ", ".join(map(str, [*arguments, num_classes]))
        return (f"from {module} import {network.__name__}"
                f"  # models/{module}.py, a file that needs torch only\n"
                f"net = {network.__name__}({arguments})")
    small = name in OF_TIMM and image_size <= SMALL_IMAGE
    architecture, arguments = timms_name(name)
    arguments = "".join(f", {key}={value!r}" for key, value in arguments.items())
    lines = ["import timm, torch" if small else "import timm",
             f'net = timm.create_model("{architecture}", num_classes={num_classes}{arguments})']
    if small:
        lines += SMALL_STEM["resnet" if name.startswith("resnet") else "mobilenet"]
    return "\n".join(lines)
