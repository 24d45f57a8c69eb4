"""Caffe's Cifar-quick as ACNet's authors train it: three 5x5 convolutions, a BatchNorm after each."""

from torch import Tensor, nn


class CifarQuick(nn.Module):
    """Cifar-quick for images of 32 pixels, `[N, 3, 32, 32]` to `[N, num_classes]`.

    As in ACNet's code (`base_model/cfqk.py`).
    """

    def __init__(self, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width, pool in ((32, nn.MaxPool2d(3, 2)), (32, nn.AvgPool2d(3, 2)), (64, nn.AvgPool2d(3, 2))):
            layers += [nn.Conv2d(in_channels, width, 5, padding=2, bias=False), nn.BatchNorm2d(width),
                       nn.ReLU(True), pool]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.fc1, self.relu, self.fc2 = nn.Linear(64 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.forward_features(x).flatten(1))))
