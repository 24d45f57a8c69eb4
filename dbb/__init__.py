"""Diverse Branch Block: convolutions that train as several branches and deploy as one. Needs torch only."""

from dbb.block import BLOCKS, AsymmetricConvBlock, DiverseBranchBlock, ReparamConv2d, branchwise
from dbb.branches import BRANCHES, Branch
from dbb.proof import Comparison, compare, compare_logits
from dbb.surgery import Report, reparameterize, replace_convs

__all__ = ["BLOCKS", "BRANCHES", "AsymmetricConvBlock", "Branch", "Comparison", "DiverseBranchBlock", "ReparamConv2d",
           "Report", "branchwise", "compare", "compare_logits", "reparameterize", "replace_convs"]
