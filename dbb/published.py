"""The published blocks, with their published signatures."""

from dbb.block import ReparamConv2d


class DiverseBranchBlock(ReparamConv2d):
    """The Diverse Branch Block with its published signature (CVPR 2021, figure 2; the authors' code).

    Arguments as `ReparamConv2d`, where `internal_channels_1x1_3x3` is `internal_channels`, and `single_init`
    the method; `**kwargs` are `mode`, `positions`, `padding_mode`, `device` and `dtype`.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 internal_channels_1x1_3x3=None, deploy=False, nonlinear=None, single_init=False, **kwargs):
        depthwise = groups == in_channels == out_channels
        branches = ("kxk", "avg", "1x1_kxk") if depthwise else ("kxk", "1x1", "1x1_avg", "1x1_kxk")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, branches,
                         internal_channels=internal_channels_1x1_3x3, deploy=deploy, nonlinear=nonlinear,
                         **kwargs)
        if single_init and not deploy:
            self.single_init()


class AsymmetricConvBlock(ReparamConv2d):
    """ACNet's block (ICCV 2019): kxk, 1xk and kx1. Arguments as `ReparamConv2d`, without `branches`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         ("kxk", "1xk", "kx1"), **kwargs)


class OnlineReparamBlock(ReparamConv2d):
    """OREPA's block (CVPR 2022): six branches, no norms. Arguments as `ReparamConv2d`, without `branches`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 mode="linear", **kwargs):
        branches = ("kxk", "1x1_avg", "1x1_prior", "1x1_kxk", "1x1", "dw_1x1")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, branches,
                         mode=mode, **kwargs)


BLOCKS = {"dbb": DiverseBranchBlock, "acb": AsymmetricConvBlock, "orepa": OnlineReparamBlock}
