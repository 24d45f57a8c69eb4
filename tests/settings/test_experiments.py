"""Every recipe is composed and trained for a step, on small made-up images."""

import re
from pathlib import Path

import pytest

import train as train_script
from tests.helpers import ROOT, write_tree

pytestmark = pytest.mark.slow

EXPERIMENTS = sorted(path.stem for path in Path(ROOT, "configs", "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Trees that stand for the data sets."""
    folder, ten, hundred = tmp_path_factory.mktemp("data"), range(10), range(100)
    cifar10 = write_tree(folder / "cifar10", ("train", "test"), [f"c{i}" for i in ten], 2, (32, 32))
    cifar100 = write_tree(folder / "cifar100", ("train", "test"), [f"c{i:02}" for i in hundred], 1, (32, 32))
    imagenet = write_tree(folder / "imagenet", ("train", "val"), ["n01", "n02"], 8, (130, 110))
    return {"cifar10": cifar10, "cifar100": cifar100, "imagenet": imagenet, "digits": None}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name, make_settings, tmp_path, roots):
    short = (f"experiment={name}", "debug=default", "logger=csv", "data.max_images=8")
    settings = make_settings(*short)
    changes = [] if roots[settings.data.name] is None else [f"data.root={roots[settings.data.name]}"]
    if settings.data.name == "imagenet" and settings.model.name != "alexnet":
        changes.append("data.image_size=96")
    if settings.model.name == "vgg16":  # whose kernels take ten seconds to convert
        changes.append("model.name=vgg16_narrow")
    result = train_script.train(make_settings(*short, *changes), tmp_path)
    assert result["predictions_changed"] == 0
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_twins_share_everything_but_the_block(name, make_settings):
    plain, acb, dbb = (make_settings(f"experiment={name}", f"block={block}")
                       for block in ("none", "acb", "dbb"))
    assert plain.block.branches == []
    assert acb.block.branches == ["kxk", "1xk", "kx1"]
    for twin in (acb, dbb):
        twin.block = plain.block
        assert twin == plain


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "demo"])
def test_headers_say_what_to_expect(name):
    lines = Path(ROOT, "configs", "experiment", f"{name}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert re.search(rf"python train.py (-m )?experiment={name}\b", header)
    assert re.search("not measured here|none was repeated here|results/", header), "whose measurement?"
