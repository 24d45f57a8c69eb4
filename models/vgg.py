"""The VGG-16 of the ACNet and DBB papers: a BatchNorm after each convolution, one layer of 512 neurons."""

from torch import Tensor, nn

WIDTHS = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool",
         512, 512, 512, "pool"),
}


class VGG(nn.Module):
    """A VGG for small images (at least 32 pixels), `[N, 3, H, W]` to `[N, num_classes]`.

    The last map is 32 times smaller. As in ACNet's code (`base_model/vgg.py`), with the mean over positions,
    where larger images leave more than one.

    Args:
        depth: layers, a key of `WIDTHS`.
        narrower: all widths are divided by this.
        num_classes: number of classes.
    """

    def __init__(self, depth: int, narrower: int, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width in WIDTHS[depth]:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            out_channels = width // narrower
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(True)]
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.fc1, self.relu = nn.Linear(in_channels, in_channels), nn.ReLU()
        self.fc2 = nn.Linear(in_channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.forward_features(x).mean((2, 3)))))
