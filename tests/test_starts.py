"""Networks that start from weights: published files, plain checkpoints, and choices that cannot be."""


import pytest
import timm
import torch
from safetensors.torch import load_file

import convert as convert_script
import eval as eval_script
import train as train_script
from models import build_model
from tests.conftest import randomize, relative_error
from tests.published_networks import image, published_model
from tests.test_scripts import TINY, run
from training.module import Classifier


def test_a_published_file_converts_without_data(make_settings, tmp_path):
    """From the command line: a file in the layout of the DBB authors, random weights and statistics."""
    weights, expected = published_model("dbb", "resnet18")
    torch.save({"state_dict": {f"module.{key}": value.float() for key, value in weights.items()}}, tmp_path / "dbb.pth.tar")
    command = ["ckpt=dbb.pth.tar", "model=resnet18_dbb", "data=none", "data.image_size=96", "logger=csv", "export=[]"]
    done = run("convert.py", *command, "source=dbb", cwd=tmp_path)
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
        settings = make_settings(f"ckpt={tmp_path}/dbb.pth.tar", *command[1:], *source, wrong, config_name="convert")
        with pytest.raises(ValueError, match=message):
            convert_script.convert(settings, tmp_path / "wrong")


def test_a_plain_run_of_ours_is_a_warm_start(make_settings, tmp_path):
    plain = train_script.train(make_settings("model=resnet20", *TINY), tmp_path / "plain")
    weights = f"model.weights={tmp_path}/plain/checkpoints/last.ckpt"
    result = train_script.train(make_settings("model=resnet20_dbb", *TINY, weights, "optim.lr=0"), tmp_path / "dbb")
    assert result["top1"] == pytest.approx(plain["top1"], abs=0.05), "only statistics moved"
    with pytest.raises(ValueError, match="another network"):
        train_script.train(make_settings("model=resnet20", *TINY, weights.replace("plain/", "dbb/")), tmp_path / "no")


def test_warm_start_computes_the_same(make_settings, tmp_path):
    """Plain weights under blocks: before the first step, the network computes what the plain one did."""
    plain = randomize(build_model("resnet20", 10, image_size=8))
    torch.save({"state_dict": {f"module.{key}": value for key, value in plain.state_dict().items()}}, tmp_path / "plain.pth")
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
    (["model=resnet18_dbb", "model.pretrained=true"], "weights of resnet18 could not be had"),
    (["model=resnet20_dbb", "model.weights=x.pth", "block.init=ones"], "would change what the trained weights compute"),
    (["model=resnet56_dbb", "model.weights=x.pth"], "another network: .* missing .*blocks.10"),
    (["model=resnet20", "block.branches=[1x1]"], "conv1: branches=.*1x1.* spans the kernel"),
    (["model=resnet20_dbb", "block.include=[layer1.*]"], "include: the pattern .layer1.*. matches no convolution; there are"),
    (["model=timm", "model.name=densenet121", "block=dbb", "data.image_size=32"], "no convolution of the network can become a block"),
    (["model=resnet20_dbb", "source=dbb"], "source=dbb: train.py goes on with its own checkpoints only"),
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
