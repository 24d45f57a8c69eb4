"""One builder for every backbone: ours by name, any other from timm, with blocks or without."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dbb import Report, replace_convs
from models import limits
from models.airbench import AirBench
from models.alexnet import AlexNet
from models.cifar_quick import CifarQuick
from models.cifar_resnet import CifarResNet
from models.say import say
from models.smallnet import SmallNet
from models.vgg import VGG
from models.weights import load_plain
from models.wide_resnet import WideResNet

SMALL_IMAGE = 64  # pixels; up to here ImageNet backbones get the stem that is usual for CIFAR


def _timms(name: str, pretrained: bool = False, **arguments) -> nn.Module:
    """A network of timm's; a ValueError if it cannot be built."""
    try:
        return timm.create_model(name, pretrained, **arguments)
    except RuntimeError as error:
        if pretrained:
            raise  # the weights could not be fetched
        raise ValueError(f"model.name={name!r} cannot be built by timm: {error}") from error


def _timm_resnet(name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
    # The papers' networks start every gamma at 1; timm would start the last one of each residual block at 0.
    net = timm.create_model(name, pretrained, num_classes=num_classes, zero_init_last=False)
    if image_size <= SMALL_IMAGE:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
        net.maxpool = nn.Identity()
    return net


def _timm_mobilenet(name: str, num_classes: int, image_size: int, pretrained: bool, **kwargs) -> nn.Module:
    net = timm.create_model(name, pretrained, num_classes=num_classes, **kwargs)
    if image_size <= SMALL_IMAGE:
        strided = [key for key, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        # The stem and the first strided block: the last map is 8 times smaller than the image, not 32.
        for key in strided[:2]:
            net.get_submodule(key).stride = (1, 1)
        net.unstrided = strided[:2]
    return net


def _start_from_timms(make: Callable[..., nn.Module]) -> nn.Module:
    """A network with timm's weights; prints which tensors are not from their file."""
    with torch.random.fork_rng(devices=[]):
        untrained = make(pretrained=False).state_dict()
    net = make(pretrained=True)
    fresh = [key for key, value in net.state_dict().items()
             if value.is_floating_point() and torch.equal(value, untrained[key])]
    if fresh:
        say("model.pretrained=true: not from the file, so they start at random: "
            f"{', '.join(fresh)}")
    return net


UNTRAINED = {  # of our own, with no weights to fetch: the class, its arguments before the number of classes
    "resnet8": (CifarResNet, 8),
    "resnet20": (CifarResNet, 20),
    "resnet56": (CifarResNet, 56),
    "wrn16_8": (WideResNet, 16, 8),
    "vgg16": (VGG, 16, 1),
    "vgg16_narrow": (VGG, 16, 8),
    "vgg11_narrow": (VGG, 11, 8),
    "cifar_quick": (CifarQuick,),
    "smallnet": (SmallNet, 0),
    "smallnet_16": (SmallNet, 1),
    "alexnet": (AlexNet,),
    "airbench": (AirBench,),
}
OF_TIMM = {
    "resnet18": partial(_timm_resnet, "resnet18"),
    "resnet34": partial(_timm_resnet, "resnet34"),
    "resnet50": partial(_timm_resnet, "resnet50"),
    # The papers' MobileNet v1 has ReLU; timm's default is ReLU6.
    "mobilenet_v1": partial(_timm_mobilenet, "mobilenetv1_100", act_layer="relu"),
    "mobilenet_v2": partial(_timm_mobilenet, "mobilenetv2_100"),
}
BACKBONES = UNTRAINED | OF_TIMM


def timms_name(name: str) -> tuple[str, dict]:
    """Name and arguments by which timm builds what has a name of ours; any other name is timm's."""
    return (OF_TIMM[name].args[0], OF_TIMM[name].keywords) if name in OF_TIMM else (name, {})


def architecture(name: str) -> tuple[str, dict]:
    """As `timms_name`, without the tag behind the dot, which names weights."""
    theirs, arguments = timms_name(name)
    return theirs.split(".")[0], arguments


def named_start(init: str | None, trained: bool) -> str:
    """The start of blocks that "auto" stands for, or None in old files, by its name in `dbb.INITS`."""
    return "single" if trained else {"auto": "mixed", None: "ones"}[init]


def refuse_unknown(name: str) -> None:
    """Raise a ValueError if a network's name is none of ours or timm's."""
    if name not in BACKBONES and not timm.is_model(name):
        nearest = get_close_matches(name, {*BACKBONES, *timm.list_models()}, n=4)
        names = ", ".join(nearest or [*BACKBONES, "timm.list_models()"])
        raise ValueError(f"model.name={name!r} is unknown here and to timm; nearest are {names}")


def _plain(name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
    """The network of a name of ours or timm's, with timm's weights or at random."""
    if name in UNTRAINED:
        make, *arguments = UNTRAINED[name]
        return make(*arguments, num_classes)
    if name in OF_TIMM:
        make = partial(OF_TIMM[name], num_classes, image_size)
    else:
        refuse_unknown(name)
        make = partial(_timms, name, num_classes=num_classes)
    if not pretrained:
        return make(pretrained=False)
    try:
        return _start_from_timms(make)
    except Exception as error:  # no network, no such weights: whatever the hub's client raises
        why = str(error).splitlines()[0]
        raise ValueError(f"model.pretrained=true: the weights of {name} could not be fetched ({why}); "
                         "model.weights=FILE starts from a file") from error


def parameter_count(name: str, num_classes: int) -> int:
    """Parameters of a plain network, counted without taking memory; 0 if there is none of that name."""
    if name not in UNTRAINED and not timm.is_model(timms_name(name)[0]):
        return 0
    with torch.device("meta"):
        if name in UNTRAINED:
            make, *arguments = UNTRAINED[name]
            net = make(*arguments, num_classes)
        else:
            net = _timms(timms_name(name)[0], num_classes=num_classes)
    return sum(p.numel() for p in net.parameters())


def refuse_larger(name: str, num_classes: int, weights: Mapping[str, Tensor]) -> None:
    """Check, before it takes memory, that the network that a file names is about as large as what it holds.

    Raises:
        ValueError: if it has far more parameters.
    """
    real = [value for value in weights.values() if value.is_floating_point() and value.itemsize > 1]
    sizes = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in real}
    needed, held = parameter_count(name, num_classes), sum(value.numel() for value in real)
    held = min(held, sum(sizes.values()) // 2)  # one tensor may have many names
    if needed > limits.PARAMETERS * held:
        raise ValueError(f"these weights are those of another network: {name} has {needed:,} parameters, the "
                         f"file {held:,}")


def build_model(name: str, num_classes: int, block: Any = None, image_size: int = 224,
                pretrained: bool = False, weights: Mapping[str, Tensor] | None = None,
                init: str | None = "auto", weights_of: str | None = None, **surgery) -> nn.Module:
    """Build a classifier `[N, 3, H, W]` to `[N, num_classes]`.

    Args:
        name: one of `BACKBONES`, or any network of timm.
        num_classes: number of classes.
        block: as `dbb.replace_convs` takes it: "dbb", a list of branches, a dict of them; None leaves plain
            convolutions.
        image_size: side of the images in pixels; decides the stem (up to 64 pixels: that of CIFAR networks).
        pretrained: start from timm's weights, which are fetched.
        weights: start from these, of the plain network in timm's or torchvision's layout.
        init: see `dbb.replace_convs`; "auto" is "mixed", with trained weights "single": the blocks compute
            what the plain network did. None, in old files, is what "auto" was: "ones", with trained weights
            "single".
        weights_of: name of the network that `weights` are of, where it is known: a state dict does not
            tell ReLU from ReLU6.
        **surgery: further arguments of `dbb.replace_convs`.

    Returns:
        The network. Its attribute `report` says of every convolution what became of it; `total_stride` side
        of the image over side of the last feature map (None for a network without one).

    Raises:
        ValueError: if a name is unknown (with the nearest known ones), the network cannot take images of that
            size, the weights are another network's or cannot be fetched, or `init` would change what trained
            weights compute.
    """
    trained = pretrained or weights is not None
    if init in ("auto", None):
        init = named_start(init, trained)
    elif trained and block is not None and init != "single":
        raise ValueError(f"block.init={init} would change what the trained weights compute: leave it out, or "
                         "take single")
    if pretrained and name in UNTRAINED:
        raise ValueError(f"model.pretrained=true: {name} has no weights to fetch; model.weights=FILE starts "
                         "from your own")
    if trained and name in OF_TIMM and OF_TIMM[name].keywords and weights_of != name:
        theirs = OF_TIMM[name].args[0]
        raise ValueError(f"model.name={name} has ReLU; these weights are of timm's network with ReLU6, or "
                         f"do not say of which: take model=timm model.name={theirs}, which has ReLU6, or by "
                         f"model.weights=FILE a checkpoint or model.safetensors of {name} from here")
    if weights_of is not None and architecture(weights_of) != architecture(name):
        raise ValueError(f"model.weights: the file says that its weights are of {weights_of}, which is "
                         f"another network than {name}: take model=timm model.name={weights_of}, or "
                         f"model.name={weights_of} if it is one of ours")
    net = _plain(name, num_classes, image_size, pretrained)
    if weights is not None:
        load_plain(net, weights)
    if trained and hasattr(net, "unstrided"):
        theirs, changed = timms_name(name)[0], ", ".join(net.unstrided)
        say(f"at {image_size} pixels {changed} have stride 1, where timm's {theirs} has 2: "
            "its weights compute something else here")
    training, example, report = net.training, torch.zeros(1, 3, image_size, image_size), Report()
    try:
        with torch.no_grad():
            net.eval()(example)
            features = net.forward_features(example)
    except Exception as error:  # of many kinds, depending on the network
        raise ValueError(f"{name} cannot take images of {image_size} pixels (data.image_size sets it): "
                         f"{error}") from error
    if block is not None:
        net, report = replace_convs(net, block, example_input=example, init=init, **surgery)
    net.report = report
    net.total_stride = round(image_size / features.shape[-1]) if getattr(features, "ndim", 0) == 4 else None
    return net.train(training)
