"""One builder for every backbone: ours by name, any other from timm, with blocks or without."""

from difflib import get_close_matches
from functools import partial

import timm
import torch
from torch import nn

from dbb import Report, replace_convs
from models.cifar_resnet import CifarResNet
from models.vgg import VGG16

SMALL_IMAGE = 64  # pixels; up to here ImageNet backbones get the stem that is usual for CIFAR


def _timm_resnet(name: str, num_classes: int, image_size: int) -> nn.Module:
    # The papers' networks start every gamma at 1; timm would start the last one of each residual block at 0.
    net = timm.create_model(name, num_classes=num_classes, zero_init_last=False)
    if image_size <= SMALL_IMAGE:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
        net.maxpool = nn.Identity()
    return net


def _timm_mobilenet(name: str, num_classes: int, image_size: int, **kwargs) -> nn.Module:
    net = timm.create_model(name, num_classes=num_classes, **kwargs)
    if image_size <= SMALL_IMAGE:
        strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        for conv in strided[:2]:  # the stem and the first strided block: total stride 8 instead of 32
            conv.stride = (1, 1)
    return net


BACKBONES = {
    "resnet20": lambda num_classes, image_size: CifarResNet(20, num_classes),
    "resnet56": lambda num_classes, image_size: CifarResNet(56, num_classes),
    "vgg16": lambda num_classes, image_size: VGG16(num_classes),
    "resnet18": partial(_timm_resnet, "resnet18"),
    "resnet34": partial(_timm_resnet, "resnet34"),
    "resnet50": partial(_timm_resnet, "resnet50"),
    # The papers' MobileNet v1 has ReLU; timm's default is ReLU6.
    "mobilenet_v1": partial(_timm_mobilenet, "mobilenetv1_100", act_layer="relu"),
    "mobilenet_v2": partial(_timm_mobilenet, "mobilenetv2_100"),
}


def build_model(name: str, num_classes: int, block: str | None = None, image_size: int = 224) -> nn.Module:
    """Build a classifier `[N, 3, H, W]` to `[N, num_classes]`, freshly initialised.

    Args:
        name: one of `BACKBONES`, or any network of timm.
        num_classes: number of classes.
        block: a name from `dbb.BLOCKS`; None leaves plain convolutions.
        image_size: side of the images in pixels; decides the stem (up to 64 pixels: that of CIFAR networks).

    Returns:
        The network. Its attribute `report` says of every convolution what became of it; `total_stride` how many pixels
        of the image lie between neighbours of the last feature map (None for a network without one).

    Raises:
        ValueError: if a name is unknown (with the nearest known ones), or the network cannot take images of that size.
    """
    if name in BACKBONES:
        net = BACKBONES[name](num_classes, image_size)
    elif timm.is_model(name):
        net = timm.create_model(name, num_classes=num_classes)
    else:
        nearest = get_close_matches(name, {*BACKBONES, *timm.list_models()}, n=4) or [*BACKBONES, "timm.list_models()"]
        raise ValueError(f"model.name={name!r} is unknown here and to timm; nearest are {', '.join(nearest)}")
    training, example, report = net.training, torch.zeros(1, 3, image_size, image_size), Report()
    try:
        with torch.no_grad():
            features = net.eval().forward_features(example)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} cannot take images of {image_size} pixels (data.image_size sets it): {error}") from error
    if block is not None:
        net, report = replace_convs(net, block, example_input=example)
    net.report, net.total_stride = report, round(image_size / features.shape[-1]) if features.ndim == 4 else None
    return net.train(training)
