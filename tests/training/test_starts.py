"""How networks start: fresh, or from weights (published, or plain ones); and choices that cannot be."""

from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

import convert as convert_script
import eval as eval_script
import train as train_script
from dbb import replace_convs
from evaluation.networks import blocks_of
from models import build_model
from models.checkpoint import load_checkpoint
from settings.schema import BlockConf
from tests.helpers import ROOT, TINY, call, randomize, relative_error
from tests.models.published_networks import image, published_model
from training import steps as train_steps
from training.module import Classifier, rough_start

pytestmark = pytest.mark.slow

BLOCKS = sorted({path.stem for path in Path(ROOT, "configs", "block").glob("*.yaml")} - {"none", "sgs"})


@pytest.mark.parametrize(("channels", "options"), [
    ((16, 32), {}), ((16, 16), {}), ((16, 32), {"stride": 2}), ((32, 32), {"groups": 4}),
    ((64, 64), {"groups": 64}), ((64, 64), {"groups": 64, "stride": 2})],
    ids=["wider", "dense", "strided", "grouped", "depthwise", "depthwise strided"])
@pytest.mark.parametrize("block", [*BLOCKS, "['kxk', 'identity', 'identity', 'avg']"])
def test_a_new_block_never_varies_more_than_the_plain_norm(make_settings, block, channels, options):
    """The default start makes a dense block the mean of its n branches, a depthwise one the plain layer.

    The mean is 1 / n of the plain norm's variance where branches are independent. It is smaller than
    1 / sqrt(n) in each, which keeps the variance, because that measured worse (benchmarks/README.md).
    """
    overrides = [f"block={block}"] if block in BLOCKS else ["block=dbb", f"block.branches={block}"]
    conf = make_settings(*overrides).block
    assert conf.init == "auto"
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(*channels, 3, padding=1, **options), nn.BatchNorm2d(channels[1])).double()
    x = torch.randn(64, channels[0], 16, 16, dtype=torch.float64)
    new, _ = replace_convs(pair, blocks_of(conf), example_input=x[:1])
    single = new[0].geometry.depthwise and "kxk" in new[0].branches
    n = 1 if conf.mode == "linear" else len(new[0].branches)
    with torch.no_grad():
        plain = pair(x).var().item()
        for mode in (conf.mode,) if conf.mode == "linear" else ("exact", "online"):
            new[0].mode = mode
            ratio = new(x).var().item() / plain
            assert ratio < 1.01
            if block in BLOCKS or single:
                assert ratio == pytest.approx(1 if single else 1 / n, rel=1 / 3)
        mean, ones = (replace_convs(pair, blocks_of(conf), example_input=x[:1], init=init)[0](x).var().item()
                      for init in ("mean", "ones"))
        assert mean / plain < 1.01
        assert ones == pytest.approx(mean * n ** 2, rel=1 / 3), "the papers"


def test_a_run_keeps_its_start(make_settings, tmp_path):
    """By name; a file from before the name was stored means gamma 1."""
    command = ["model=resnet8_dbb", *TINY]
    train_script.train(make_settings(*command), tmp_path / "new")
    stored = load_checkpoint(tmp_path / "new" / "checkpoints" / "last.ckpt")["dbb"]["settings"]
    assert stored["block"]["init"] == "mixed"
    old = asdict(make_settings(*command))
    old["block"] |= {"init": None, "positions": 256}
    (tmp_path / "old").mkdir()  # of a job that stopped in its first epoch
    (tmp_path / "old" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    started = []

    class Watched(Classifier):
        def on_train_start(self):
            super().on_train_start()
            started.append([gamma.mean().item() for gamma in self.net.conv1.gammas().values()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_steps, "Classifier", Watched)
        train_script.train(make_settings(*command), tmp_path / "old")
    assert started == [[1, 1, 1, 1]]
    stored = load_checkpoint(tmp_path / "old" / "checkpoints" / "last.ckpt")["dbb"]["settings"]
    assert (stored["block"]["init"], stored["block"]["positions"]) == (None, 256)
    with pytest.raises(ValueError, match="already holds a run with another block.init"):
        train_script.train(make_settings(*command, "block.init=mean"), tmp_path / "old")
    online = make_settings(f"ckpt={tmp_path}/new/checkpoints/last.ckpt", "block=dbb_online")
    assert (online.block.mode, online.block.init) == ("online", "mixed"), "another mode is no other start"


@pytest.mark.parametrize(("overrides", "rough"), [
    (["block.init=ones"], True), ([], False), (["block.init=third"], False), (["block=none"], False),
    (["block.init=ones", "optim.lr=0.02"], False), (["block.init=ones", "optim.warmup_epochs=1"], False),
    (["block=orepa", "block.init=ones"], False)])
def test_what_is_a_rough_start(make_settings, overrides, rough):
    assert bool(rough_start(make_settings("model=resnet8_dbb", "optim.lr=0.1", *overrides))) == rough


def test_a_rough_start_is_named(make_settings, tmp_path, capsys):
    train_script.train(make_settings("model=resnet8_dbb", *TINY, "optim.lr=0.1", "block.init=ones"), tmp_path)
    printed = capsys.readouterr().out
    assert "block.init=ones with a learning rate of 0.1 and no warm-up is a rough start" in printed


def test_old_settings_mean_the_old_start():
    assert BlockConf(init=None) != BlockConf()
    fresh = build_model("resnet8", 10, ["kxk", "1x1"], image_size=8, init=None)
    assert {gamma.mean().item() for gamma in fresh.conv1.gammas().values()} == {1}
    trained = build_model("resnet8", 10, image_size=8).state_dict()
    warm = build_model("resnet8", 10, ["kxk", "1x1"], image_size=8, init=None, weights=trained)
    assert [gamma.mean().item() for gamma in warm.conv1.gammas().values()] == [1, 0]


def test_a_published_file_converts_without_data(make_settings, tmp_path):
    """From the command line: a file in the layout of the DBB authors, random weights and statistics."""
    weights, expected = published_model("dbb", "resnet18")
    weights = {f"module.{key}": value.float() for key, value in weights.items()}
    torch.save({"state_dict": weights}, tmp_path / "dbb.pth.tar")
    command = ["ckpt=dbb.pth.tar", "model=resnet18_dbb", "data=none", "data.image_size=96",
               "logger=csv", "export=[]"]
    done = call("convert.py", *command, "source=dbb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 of 64 predictions changed" in done.stdout
    assert "no accuracy was measured" in done.stdout
    stock = timm.create_model("resnet18", num_classes=expected.shape[1]).eval()
    stock.load_state_dict(load_file(tmp_path / "outputs" / "dbb.pth" / "convert" / "model.safetensors"))
    with torch.no_grad():
        assert relative_error(stock(image("resnet18").float()), expected) < 1e-5
    two_lists = "another network: .* missing .* unexpected"
    for wrong, message in (("source=acnet", two_lists), ("block=acb", two_lists),
                           ("model=resnet20", "no layout for model.name=resnet20")):
        source = [] if wrong.startswith("source") else ["source=dbb"]
        settings = make_settings(f"ckpt={tmp_path}/dbb.pth.tar", *command[1:], *source, wrong,
                                 config_name="convert")
        with pytest.raises(ValueError, match=message):
            convert_script.convert(settings, tmp_path / "wrong")


def test_a_plain_run_of_ours_is_a_warm_start(make_settings, tmp_path):
    plain = train_script.train(make_settings("model=resnet20", *TINY), tmp_path / "plain")
    weights = f"model.weights={tmp_path}/plain/checkpoints/last.ckpt"
    warm = make_settings("model=resnet20_dbb", *TINY, weights, "optim.lr=0")
    result = train_script.train(warm, tmp_path / "dbb")
    assert result["top1"] == pytest.approx(plain["top1"], abs=0.05), "only statistics moved"
    blocks = make_settings("model=resnet20", *TINY, weights.replace("plain/", "dbb/"))
    with pytest.raises(ValueError, match="another network"):
        train_script.train(blocks, tmp_path / "no")


def test_warm_start_computes_the_same(make_settings, tmp_path):
    """Plain weights under blocks: before the first step, the network computes what the plain one did."""
    plain = randomize(build_model("resnet20", 10, image_size=8))
    weights = {f"module.{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "plain.pth")
    settings = make_settings("model=resnet20_dbb", *TINY, f"model.weights={tmp_path}/plain.pth")
    net, x = Classifier(settings, list("0123456789"), 8).net, torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(net.eval()(x), plain.eval()(x)) < 1e-5
        assert relative_error(net.train()(x), plain.train()(x)) < 1e-5
    result = train_script.train(settings, tmp_path / "run")
    (tmp_path / "plain.pth").unlink()  # what was trained does not need it any more
    ckpt = f"ckpt={tmp_path}/run/checkpoints/last.ckpt"
    evaluated = eval_script.evaluate(make_settings(ckpt, config_name="eval"))
    assert evaluated == {key: pytest.approx(result[key], rel=1e-6) for key in ("top1", "top5", "loss")}
    train_script.train(make_settings(ckpt, "trainer.max_epochs=2"), tmp_path / "run")
    with pytest.raises(ValueError, match="plain.pth: there is no such file"):
        Classifier(settings, list("0123456789"), 8)


@pytest.mark.parametrize(("overrides", "message"), [
    (["model=resnet20_dbb", "model.pretrained=true"], "resnet20 has no weights to fetch"),
    (["model=resnet18_dbb", "model.pretrained=true"], "weights of resnet18 could not be fetched"),
    (["model=resnet20_dbb", "model.weights=x.pth", "block.init=ones"],
     "would change what the trained weights compute"),
    (["model=resnet56_dbb", "model.weights=x.pth"], "another network: .* missing .*blocks.10"),
    (["model=resnet20", "block.branches=[1x1]"], "conv1: branches=.*1x1.* spans the kernel"),
    (["model=resnet20_dbb", "block.include=[layer1.*]"],
     "include: the pattern .layer1.*. matches no convolution; there are"),
    (["model=timm", "model.name=densenet121", "block=dbb", "data.image_size=32"],
     "no convolution of the network can become a block"),
    (["model=resnet20_dbb", "source=dbb"], "source=dbb: train.py continues its own checkpoints only"),
    (["model=resnet20_dbb", "data=none"], "data=none has nothing to train on")])
def test_wrong_models_and_blocks(make_settings, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    torch.save(build_model("resnet20", 10, image_size=8).state_dict(), "x.pth")
    with pytest.raises(ValueError, match=message):
        train_script.train(make_settings(*TINY, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
