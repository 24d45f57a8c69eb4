"""The AlexNet of the DBB paper: torchvision's widths, a BatchNorm after every convolution."""

from torch import Tensor, nn

SHAPES = ((64, 11, 4, True), (192, 5, 1, True), (384, 3, 1, False), (384, 3, 1, False), (256, 3, 1, True))


class AlexNet(nn.Module):
    """AlexNet for images of 224 pixels, `[N, 3, 224, 224]` to `[N, num_classes]`.

    As in DBB's code (`alexnet.py`).
    """

    def __init__(self, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width, kernel_size, stride, pool in SHAPES:
            padding = 2 if kernel_size > 3 else 1
            layers += [nn.Conv2d(in_channels, width, kernel_size, stride, padding, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(True), *([nn.MaxPool2d(3, 2)] if pool else [])]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(256 * 6 * 6, 4096), nn.ReLU(True), nn.Dropout(),
                                        nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(),
                                        nn.Linear(4096, num_classes))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x).flatten(1))
