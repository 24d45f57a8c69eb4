"""Every knob is checked; twins, groups and experiments compose."""

import os
import re
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dbb import ReparamConv2d
from evaluation.networks import build_network
from models import BACKBONES, build_model
from runs.folder import RunFolder
from settings import folders
from tests.helpers import ROOT, TINY
from train import train
from training.module import try_optimizer

MODELS = [path.stem for path in Path(ROOT, "configs", "model").glob("*.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "knob"), [
    ("trainer.max_epochs=abc", "trainer.max_epochs"), ("trainer.max_epoch=3", "max_epoch"),
    ("+trainer.max_epoch=3", "max_epoch"), ("trainer.limit_train_batches=many", "limit_train_batches"),
    ("trainer.limit_train_batches=0", "limit_train_batches"),
    ("trainer.max_time=abc", "trainer.max_time"), ("trainer.max_time=00:00:00:00", "trainer.max_time"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch"),
    ("trainer.log_every_n_steps=-1", "trainer.log_every_n_steps"),
    ("trainer.profiler=xla", "trainer.profiler"), ("trainer.accelerator=CPU", "trainer.accelerator"),
    ("+nonsense=1", "nonsense"), ("seed=-1", "seed"), ("source=dbbb", "source"),
    ("model=resnet19", "resnet19"), ("model=timm", "model.name"), ("block=dbbb", "dbbb"),
    ("block.name=dbb", "block.branches is empty"), ("block.layers=[{module:a*}]", "module"),
    ("block.branches=[kxk,1x2]", "block.branches=1x2 is unknown"),
    ("block.layers=[{modules:a*,branches:[kxkk]}]", "did you mean kxk"),
    ("block.init=four", "block.init"), ("block.copies=0", "block.copies"),
    ("block.mode=onlin", "did you mean online"), ("block.mode=3", "block.mode"),
    ("block.positions=3", "block.positions"), ("block.kernel_sizes=[]", "block.kernel_sizes"),
    ("block.kernel_sizes=[3x3]", "block.kernel_sizes"), ("block.copies=3", "block.branches is empty"),
    ("block.include=[a]", "block.branches is empty"),
    ("data.flip=perhaps", "data.flip"), ("data.color_jitter=true", "data.color_jitter"),
    ("data.batch_size=0", "data.batch_size"), ("data.std=[0,1,1]", "data.std"),
    ("data.mean=[125,123,114]", "data.mean"), ("data.std=[63,62,66]", "data.std"),
    ("data.val_size=-1", "data.val_size"), ("data.image_size=-3", "data.image_size"),
    ("data.interpolation=cubic", "did you mean bicubic"), ("data.name=cifar11", "did you mean cifar10"),
    ("data.mixup=1e-300", "data.mixup"), ("data.cutmix=0.0001", "data.cutmix"),
    ("data.crop_pct=0.9", "data.crop_pct"), ("data.crop_pct=0", "data.crop_pct"),
    ("optim.ema_decay=1", "optim.ema_decay"), ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val"),
    ("optim.label_smoothing=2", "label_smoothing"), ("optim.warmup_epochs=-1", "warmup_epochs"),
    ("optim.name=sgdd", "did you mean sgd"), ("logger.name=wand", "did you mean wandb")])
def test_wrong_settings_fail_at_once(make_settings, override, knob):
    with pytest.raises((ValueError, HydraException), match=knob.replace(".", r"\.")) as error:
        make_settings("data=digits", *([override] if override != "model=timm" else ["model=timm"]))
    assert knob in f"{error.value} {error.value.__cause__}"


@pytest.mark.slow
def test_every_backbone_has_its_twin(make_settings):
    assert set(MODELS) == {*BACKBONES, *(f"{name}_dbb" for name in BACKBONES), "timm"}
    for name in BACKBONES:
        assert make_settings(f"model={name}_dbb") == make_settings(f"model={name}", "block=dbb")
    assert make_settings("model=resnet8") == make_settings("model=resnet8_dbb", "block=none")
    assert make_settings("model=resnet8_dbb", "block=acb").block.name == "acb"


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagenet", "digits"])
def test_groups_compose(make_settings, data):
    settings = make_settings(f"data={data}", "debug=default", "logger=csv")
    assert settings.data.name == data
    assert settings.logger.name == "csv"
    assert settings.trainer.max_epochs < 100


@pytest.mark.slow
@pytest.mark.parametrize(("block", "dense", "depthwise"), [
    *((name, "kxk + 1x1 + 1x1_avg + 1x1_kxk", "kxk + avg + 1x1_kxk") for name in ("dbb", "dbb_online")),
    ("dbb_lite", "kxk + 1x1 + 1x1_avg", "kxk + avg"),
    ("acb", "kxk + 1xk + kx1", "kxk + 1xk + kx1"), ("repvgg", "kxk + 1x1", "kxk + 1x1 + identity"),
    ("mobileone", "kxk + kxk_2 + kxk_3 + kxk_4 + 1x1", "kxk + kxk_2 + kxk_3 + kxk_4 + 1x1 + identity"),
    ("orepa", *["kxk + 1x1_avg + 1x1_prior + 1x1_kxk + 1x1 + dw_1x1"] * 2),
    ("expand", *["1x1_kxk_1x1"] * 2), ("none", None, None), ("sgs", None, None)])
def test_every_block_is_a_list(make_settings, block, dense, depthwise):
    net = build_network(make_settings("data=digits", "model=mobilenet_v1", f"block={block}"), 10, 8)
    assert [row.block for row in net.report][:2] == ([dense, depthwise] if dense else [])
    assert {path.stem for path in Path(ROOT, "configs", "block").glob("*.yaml")} == {
        "dbb", "dbb_lite", "dbb_online", "acb", "repvgg", "mobileone", "orepa", "expand", "none",
        "sgs"}, "each is tested here"


def test_a_list_from_the_command_line(make_settings):
    layers = "[{modules:blocks.0.*,branches:[kxk,identity]},{modules:blocks.1.conv1,branches:[]}]"
    settings = make_settings("model=resnet20", "block.branches=[kxk,1x1,1xk,kx1]", "block.init=third",
                             "block.exclude=[conv1]", f"block.layers={layers}")
    assert settings.block.name == "custom"
    net = build_network(settings, 10, 8)
    rows = {row.module: row for row in net.report}
    assert rows["blocks.3.conv1"].block == "kxk + 1x1 + 1xk + kx1"
    assert rows["blocks.0.conv2"].block == "kxk + identity"
    assert (rows["blocks.1.conv1"].block, rows["conv1"].reason) == (None, "excluded")
    assert all((branch.bn.weight == 1 / 3).all() for branch in net.blocks[4].conv1.branches.values())


def test_mobileone_takes_a_number_of_copies(make_settings):
    net = build_network(make_settings("model=resnet20", "block=mobileone", "block.copies=3"), 10, 8)
    assert list(net.blocks[0].conv1.branches) == ["kxk", "kxk_2", "kxk_3", "1x1", "identity"]


def test_modes_reach_every_layer(make_settings):
    settings = make_settings("data=digits", "model=resnet20", "block=dbb", "block.mode=online",
                             "block.positions=99", "block.layers=[{modules:blocks.0.*,branches:[kxk,1x1]}]")
    net = build_network(settings, 10, 8)
    blocks = [module for module in net.modules() if isinstance(module, ReparamConv2d)]
    assert len(blocks) == 19
    assert {(block.mode, block.positions) for block in blocks} == {("online", 99)}


def test_dbb_is_the_published_block(make_settings):
    ours = build_network(make_settings("model=mobilenet_v1", "block=dbb"), 10, 32)
    published = build_model("mobilenet_v1", 10, "dbb", 32)
    assert ours.report == published.report


@pytest.mark.parametrize(("overrides", "expected"), [
    (["data=imagenet"], ([0.485, 0.456, 0.406], "bicubic", 0.95)),
    (["data=digits"], ([0.485, 0.456, 0.406], "bicubic", 0.875)),
    (["data=imagenet", "data.mean=[0,0,0]", "data.crop_pct=0.9"], ([0, 0, 0], "bicubic", 0.9)),
    (["data=digits", "model=timm", "model.name=mobilenetv1_100"], ([0.5] * 3, "bicubic", 0.875)),
    (["data=digits", "model.pretrained=false"], ([0.305] * 3, "bilinear", 0.875))])
def test_timms_weights_bring_their_normalisation(make_settings, capsys, overrides, expected):
    data = make_settings("model.pretrained=true", *overrides).data
    assert (data.mean, data.interpolation, data.crop_pct) == expected
    printed = capsys.readouterr().out
    assert ("images as for timm's weights (" in printed) == ("model.pretrained=false" not in overrides)
    assert ("data.std=" in printed) == ("model.pretrained=false" not in overrides)
    assert ("data.mean=" in printed) == (expected[0] not in ([0, 0, 0], [0.305] * 3)), "not what was named"


def test_a_tag_that_timm_does_not_know(make_settings):
    with pytest.raises(ValueError, match=r"model.name=resnet18.nope: Invalid pretrained tag \(nope\)"):
        make_settings("data=digits", "model=timm", "model.name=resnet18.nope", "model.pretrained=true")


@pytest.mark.parametrize(("data", "name", "told"), [
    ("imagenet", "dm_nfnet_f0", True), ("digits", "dm_nfnet_f0", False), ("imagenet", "resnet18", False)])
def test_a_crop_that_is_not_followed_is_told(make_settings, capsys, data, name, told):
    make_settings("model.pretrained=true", "model=timm", f"model.name={name}", f"data={data}")
    assert ("crop_mode is squash for these weights: it is not followed" in capsys.readouterr().out) == told


def test_seed_zero_is_a_seed(make_settings):
    assert make_settings("seed=0").seed == 0


def test_normalisation_of_the_digits_is_theirs(make_settings):
    from images.data import ImageData
    settings = make_settings("data=digits")
    data = ImageData(settings.data, 0)
    data.load(train=True)
    pixels = data.train_set.images.double() / 255
    assert settings.data.mean[0] == pytest.approx(pixels.mean().item(), abs=5e-3)
    assert settings.data.std[0] == pytest.approx(pixels.std().item(), abs=5e-3)


def test_slurm_is_asked_for_in_its_jobs_only(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit, match="error: trainer=slurm: SLURM_JOB_ID"):
        folders.slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert folders.slurm_job() == "42"


def test_a_sweep_takes_seeds_later_and_other_trees_for_others(tmp_path, monkeypatch):
    """The folders of its first jobs, without a seed, are those of the default seed."""
    for first, then in (([], ["seed=0"]), (["seed=0"], [])):
        block = "block=acb" if first else "block=dbb"
        made = folders.job_name("digits", [block, *first], tmp_path)
        (tmp_path / made).mkdir()
        assert folders.job_name("digits", [block, *then], tmp_path) == made
        assert folders.job_name("digits", [block, "seed=1"], tmp_path) == f"{block.replace('=', '-')}+seed-1"
    monkeypatch.chdir(tmp_path)
    for first, then in (("data.root=a/", "data.root=a"), ("data.root=b", "data.root=./b/"),
                        (f"data.root={tmp_path}/c", "data.root=c"), ("optim.lr=1e-1", "optim.lr=.10")):
        made = folders.job_name("folder", [first], tmp_path)
        (tmp_path / made).mkdir()
        assert folders.job_name("folder", [then, "seed=0"], tmp_path) == made
    watched, quiet = ["block=repvgg", "trainer.enable_progress_bar=false"], "block-repvgg"
    assert folders.job_name("digits", watched, tmp_path) == quiet
    (tmp_path / f"{quiet}+trainer.enable_progress_bar-false").mkdir()  # as it was once called
    assert folders.job_name("digits", watched, tmp_path) == f"{quiet}+trainer.enable_progress_bar-false"
    for split in ("train", "test"):
        (tmp_path / "A" / split).mkdir(parents=True)
    names = {folders.job_name("cifar10", [f"data.root={tmp_path}/{root}"]) for root in "ABC"}
    assert len(names) == 2, "A is a tree; B and C are places for the official archive"


def test_a_job_of_a_sweep_has_its_settings_as_its_folder():
    name = partial(folders.job_name, "cifar10")
    plain, dbb = ["block=none", "seed=0"], ["block=dbb", "seed=0"]
    of_no_run = ["data.root=a/b", "logger=csv", "out=c", "trainer.max_time=00:01:00:00",
                 "data.download=false", "checkpoint.every_n_train_steps=5"]
    assert name(dbb) == name([*reversed(dbb), *of_no_run]) == "block-dbb+seed-0"
    assert name(plain) == name([*plain, "block.init=third"]) == "block-none+seed-0", "one plain twin"
    assert name(["logger=csv"]) == "defaults"
    odd = [["block.branches=[avg,kxk]"], ["block.branches=[avg_kxk]"], ["block.branches=[avg+kxk]"],
           ["optim.lr=1" + "0" * 200], ["optim.lr=1" + "0" * 201], ["model.weights='" + "\u00e9" * 140 + "'"]]
    roots = [folders.job_name("folder", ["data=folder", f"data.root={root}"]) for root in ("A", "B")]
    assert roots == ["data.root-A+data-folder", "data.root-B+data-folder"], "other images, another job"
    names = {name(overrides) for overrides in odd}
    assert len(names) == len(odd)
    assert all(re.fullmatch(r"[\w.+-]{1,150}", name) for name in names)


def test_optimisers_that_cannot_train_here_are_refused(make_settings):
    """Of timm's list: what wants gradients of gradients, or a GPU and a package of its own; nothing else."""
    settings, refused = make_settings("data=digits"), set()
    for settings.optim.name in timm.optim.list_optimizers():
        try:
            try_optimizer(settings, torch.device("cpu"))
        except ValueError:
            refused.add(settings.optim.name)
    expected = {name for name in timm.optim.list_optimizers()
                if timm.optim.get_optimizer_info(name).second_order or name.startswith(("bnb", "fused"))}
    assert "adahessian" in expected
    assert refused == expected
    settings = make_settings("data=digits", "optim.name=sgd", "optim.momentum=0")
    with pytest.raises(ValueError, match=r"optim.name=sgd cannot train here \(Nesterov"):
        try_optimizer(settings, torch.device("cpu"))


def test_an_optimiser_is_tried_before_the_data_is_read(make_settings, tmp_path):
    settings = make_settings("model=resnet8", "logger=csv", "optim.name=adahessian", "data=folder",
                             f"data.root={tmp_path}/nowhere")
    with pytest.raises(ValueError, match="optim.name=adahessian cannot train here"):
        train(settings, tmp_path)


def test_a_tilde_is_the_home_folder(make_settings, tmp_path, monkeypatch):
    """A shell leaves `out="~/runs"` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder.of(make_settings('out="~/runs"'))
    assert folder.path == tmp_path / "runs"
    train(make_settings("model=resnet8", *TINY, "data.max_images=64", "data.batch_size=32"), folder.path)
    again = make_settings('ckpt="~/runs/checkpoints/last.ckpt"')
    assert RunFolder.of(again).path == tmp_path / "runs"


@pytest.mark.parametrize(("word", "said"), [
    ("out='~nobody_here/x'", "out=~nobody_here/x is no path: Could not determine home"),
    ("data.root='~nobody_here/x'", "data.root=~nobody_here/x is no path"),
    ("data.root='/caf\udce9'", r"data.root=/caf\\udce9 is not UTF-8: rename"),  # é in Latin-1
    ("data.root=circle", "data.root=circle is no path: Symlink loop")])
def test_paths_that_lead_nowhere(make_settings, tmp_path, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match=said):
        make_settings(word)


def test_the_name_of_a_logger_is_no_other_run_of_it(make_settings, tmp_path, capsys):
    """`logger=wandb`, typed again with ckpt=, keeps the id; another is taken where it is named."""
    train(make_settings("model=resnet8", *TINY, "logger.id=abc"), tmp_path)
    ckpt = f"ckpt={tmp_path}/checkpoints/last.ckpt"
    assert make_settings(ckpt, "logger=wandb").logger.id == "abc"
    assert "logger.id" not in capsys.readouterr().out
    assert make_settings(ckpt, "logger=wandb", "logger.id=other").logger.id == "other"


def test_the_folder_of_a_sweep(monkeypatch, tmp_path):
    """`out='~/study'` is a folder in the home, as for a single run; a file is a sentence, as there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep = OmegaConf.create({"out": "~/study", "dir": "${sweep_folder:${out},x}"})
    assert sweep.dir == str(tmp_path / "study")
    Path(tmp_path, "file").touch()
    sweep.out = "~/file"
    with pytest.raises(SystemExit, match="cannot write into .*file .File exists.: choose another folder"):
        _ = sweep.dir
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "file")):
        make(tmp_path / "study" / "multirun.yaml")
        sweep.out = "~/study"
        with pytest.raises(SystemExit, match="multirun.yaml, which Hydra writes, is a link, a pipe"):
            _ = sweep.dir
        (tmp_path / "study" / "multirun.yaml").unlink()
