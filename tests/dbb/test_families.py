"""Surgery on the families of timm and torchvision."""

from pathlib import Path

import pytest

from tests.helpers import ROOT
from tools.families import TIMM, TORCHVISION, examine

pytestmark = pytest.mark.slow

SLOW = {"resnet18", "resnet50d", "res2net50_14w_8s", "inception_resnet_v2", "inception_v4", "cspdarknet53",
        "xception41", "cspresnet50", "mobileone_s0", "dm_nfnet_f0", "resnetv2_50", "selecsls42b", "darknet17",
        "tf_efficientnetv2_b0", "ghostnetv2_100", "dla34", "inception_v3", "hrnet_w18_small", "seresnet18",
        "vgg11_bn", "ecaresnet26t", "dpn48b", "hgnetv2_b0", "skresnet18", "dla46x_c", "resnetv2_50x1_bit",
        "efficientformer_l1", "tf_efficientnet_b0", "fbnetc_100", "regnetz_005", "efficientnet_b0",
        "semnasnet_075", "spnasnet_100"}
SLOW_OF_TORCHVISION = {"vgg11", "vgg11_bn", "wide_resnet50_2", "alexnet", "inception_v3", "resnet18",
                       "resnext50_32x4d"}
FAMILIES = [("timm", name) for name in TIMM if name not in SLOW] + \
    [("torchvision", name) for name in TORCHVISION if name not in SLOW_OF_TORCHVISION]


@pytest.mark.parametrize(("library", "name"), FAMILIES)
def test_families(library, name):
    """All but the slow ones of docs/families.md, which `python tools/families.py` writes."""
    finding = examine(library, name)
    rows = Path(ROOT, "docs", "families.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith(f"| {library} | {name} |")]
    assert f"| {finding.swapped} of {finding.convolutions} |" in row, "the table is out of date"
    if finding.swapped:
        assert finding.same_function < 1e-12
        assert finding.after_conversion < 1e-12


def test_there_are_enough_families():
    assert len({name for library, name in FAMILIES if library == "timm"}) >= 30
    assert len({name for library, name in FAMILIES if library == "torchvision"}) >= 10
