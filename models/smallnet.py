"""SmallNet of ExpandNets (Guo et al., NeurIPS 2020): three 3x3 convolutions, no shortcuts, few channels."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """SmallNet for images of 32 pixels, `[N, 3, 32, 32]` to `[N, num_classes]`.

    As in the authors' code (`exp_cifar/models/cifar_tiny_3.py`): no padding, a BatchNorm after each
    convolution.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width in (8, 16, 32):
            layers += [nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(True),
                       nn.MaxPool2d(2)]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.fc1, self.relu, self.fc2 = nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.forward_features(x).flatten(1))))
