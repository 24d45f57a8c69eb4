"""The wide ResNets of Zagoruyko and Komodakis (BMVC 2016) for small images.

Norm and ReLU come before each convolution.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class WideBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a convolution where width or stride change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-`depth`-`width` without dropout, `[N, 3, H, W]` to `[N, num_classes]`.

    The last map is 4 times smaller.

    Args:
        depth: 6n + 4: 16, 22, 28, 40.
        width: factor on 16, 32 and 64 channels.
        num_classes: number of classes.
    """

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, in_channels = [], 16
        for stage in range(3):
            out_channels = 16 * 2**stage * width
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(in_channels, out_channels, stride=2 if stage and not index else 1))
                in_channels = out_channels
        self.blocks, self.bn = nn.Sequential(*blocks), nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.blocks(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))
