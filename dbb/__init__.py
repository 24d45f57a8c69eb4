"""Diverse Branch Block: convolutions that train as several branches and deploy as one. Needs torch only."""

from dbb import branches  # noqa: F401  puts the branches into BRANCHES
from dbb.block import POSITIONS, ReparamConv2d, branchwise
from dbb.branch import BRANCHES, Branch
from dbb.deploy import biases, fold_norms, reparameterize, restore_norms
from dbb.modes import MODES
from dbb.proof import Comparison, branch_shares, compare, compare_logits
from dbb.published import BLOCKS, AsymmetricConvBlock, DiverseBranchBlock, OnlineReparamBlock
from dbb.sgs import SpatialGradientScaling, spatial_gradient_scale
from dbb.surgery import INITS, NothingSwappedError, Report, replace_convs

__all__ = ["BLOCKS", "BRANCHES", "INITS", "MODES", "POSITIONS", "AsymmetricConvBlock", "Branch", "Comparison",
           "DiverseBranchBlock", "NothingSwappedError", "OnlineReparamBlock", "ReparamConv2d", "Report",
           "SpatialGradientScaling", "biases", "branch_shares", "branchwise", "compare", "compare_logits",
           "fold_norms", "reparameterize", "replace_convs", "restore_norms", "spatial_gradient_scale"]
