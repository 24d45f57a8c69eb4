"""The VGG-16 of the ACNet and DBB papers: a BatchNorm after every convolution, pooling, and one layer of 512 neurons."""

from torch import Tensor, nn

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


class VGG16(nn.Module):
    """VGG-16 for small images (at least 32 pixels), `[N, 3, H, W]` to `[N, num_classes]`, total stride 32.

    As in ACNet's code (`base_model/vgg.py`), with the mean over positions, where larger images leave more than one.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width in WIDTHS:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.fc1, self.relu, self.fc2 = nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.forward_features(x).mean((2, 3)))))
