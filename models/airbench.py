"""The network of airbench94 (Jordan 2024, arXiv 2404.00498, section 3): CIFAR-10 in little computing."""

import torch
from torch import Tensor, nn


def conv_norm(in_channels: int, out_channels: int, pool: bool) -> list[nn.Module]:
    """Convolution, norm, by choice pooling, GELU.

    The convolution starts as the identity on the channels that it has (section 3.2).
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:in_channels].data)
    # Pooling follows the norm, not the convolution as in airbench, so that convolution and norm are a pair
    # and can become a block.
    return [conv, nn.BatchNorm2d(out_channels, momentum=0.4), *([nn.MaxPool2d(2)] if pool else []), nn.GELU()]


class AirBench(nn.Module):
    """A frozen layer that whitens patches of 2x2 pixels, and three groups of two convolutions.

    `[N, 3, 32, 32]` to `[N, num_classes]`.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad_(False)
        layers, in_channels = [nn.GELU()], 24
        for width in (64, 256, 256):
            layers += [*conv_norm(in_channels, width, pool=True), *conv_norm(width, width, pool=False)]
            in_channels = width
        self.layers, self.pool = nn.Sequential(*layers), nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first layer to the principal components of the patches of some images, and their negatives.

        They are scaled to variance 1.

        Args:
            images: normalised, `[N, 3, H, W]`.
            eps: added to the variances; airbench's.
        """
        patches = nn.functional.unfold(images, 2).transpose(1, 2).flatten(0, 1)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernel = (components / (variances + eps).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.whitening.weight.copy_(torch.cat([kernel, -kernel]))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(self.whitening(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.forward_features(x)).flatten(1)) / 9
