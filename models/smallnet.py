"""SmallNet of ExpandNets (Guo et al., NeurIPS 2020): three 3x3 convolutions, no shortcuts, few channels."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """SmallNet for images of 32 pixels, or of 16 with padding: `[N, 3, H, W]` to `[N, num_classes]`.

    As in the authors' code (`exp_cifar/models/cifar_tiny_3.py`): no padding, a BatchNorm after each
    convolution. Padded by 1, the same layers take half the side.
    """

    def __init__(self, padding: int, num_classes: int):
        super().__init__()
        layers, in_channels = [], 3
        for width in (8, 16, 32):
            layers += [nn.Conv2d(in_channels, width, 3, padding=padding), nn.BatchNorm2d(width),
                       nn.ReLU(True), nn.MaxPool2d(2)]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.fc1, self.relu, self.fc2 = nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.forward_features(x).flatten(1))))
