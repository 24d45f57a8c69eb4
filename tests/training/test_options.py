"""Options of training: modes, precisions, averages of weights, synchronised norms, compilation, schedule."""

import os
import re

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import convert as convert_script
import eval as eval_script
import train as train_script
from models.checkpoint import load_checkpoint
from tests.helpers import TINY, randomize
from training.module import Classifier, warmup_cosine

pytestmark = pytest.mark.slow


@pytest.fixture
def convert(make_settings):
    """Convert the run in a folder; of the files, only what every conversion writes."""
    def convert(folder):
        settings = make_settings(f"ckpt={folder}/checkpoints/last.ckpt", "export=[]", config_name="convert")
        return convert_script.convert(settings, folder / "convert")
    return convert


def test_a_mode_is_a_choice_of_training_alone(make_settings, convert, tmp_path, capsys):
    """It is told, stored, and may be another one afterwards; OREPA's block has weights of its own."""
    short = (*TINY, "trainer.limit_train_batches=2")
    online = make_settings("model=resnet8_dbb", "block.mode=online", "block.positions=64", *short)
    trained = train_script.train(online, tmp_path / "online")
    assert "block.mode=online: expect a training step of" in capsys.readouterr().out
    ckpt = f"ckpt={tmp_path}/online/checkpoints/last.ckpt"
    assert load_checkpoint(ckpt.removeprefix("ckpt="))["dbb"]["settings"]["block"]["mode"] == "online"
    for mode in ((), ("block.mode=exact",)):
        result = eval_script.evaluate(make_settings(ckpt, *mode, config_name="eval"))
        assert result == {key: pytest.approx(trained[key], rel=1e-6) for key in ("top1", "top5", "loss")}
    assert "changed from the checkpoint: block.mode: online -> exact" in capsys.readouterr().out
    make_settings(ckpt, "logger=tensorboard")
    assert "changed from the checkpoint: logger.name: csv -> tensorboard\n" in capsys.readouterr().out
    train_script.train(make_settings(ckpt, "block.mode=exact", "trainer.max_epochs=2"), tmp_path / "online")

    train_script.train(make_settings("model=resnet8", "block=orepa", *short), tmp_path / "orepa")
    ckpt = f"ckpt={tmp_path}/orepa/checkpoints/last.ckpt"
    report = convert(tmp_path / "orepa")
    assert report["predictions_changed"] == 0
    assert report["after"]["top1"] == report["before"]["top1"]
    with pytest.raises(ValueError, match="another network"):
        eval_script.evaluate(make_settings(ckpt, "block.mode=exact", config_name="eval"))


@pytest.mark.parametrize("extra", [
    ("block=acb", "optim.ema_decay=0.5"),
    ("trainer.precision=bf16-mixed", "model.channels_last=true", "trainer.gradient_clip_val=1.0"),
    ("model=timm", "model.name=mobilenetv3_small_050", "block=dbb", "data.image_size=32", "data.val_size=50"),
    ("block=none", "trainer.precision=bf16-true")], ids=["acb and ema", "bf16", "timm", "plain bf16-true"])
def test_options(make_settings, convert, tmp_path, extra):
    model = [] if any(o.startswith("model=") for o in extra) else ["model=resnet8_dbb"]
    settings = make_settings(*model, *TINY, "trainer.limit_train_batches=2", *extra)
    result = train_script.train(settings, tmp_path)
    report = convert(tmp_path)
    assert report["predictions_changed"] == 0
    assert report["before"]["top1"] == result["top1"]


def test_ema_is_what_is_kept(make_settings, tmp_path):
    train_script.train(make_settings("model=resnet20", *TINY, "optim.ema_decay=0.5"), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    kept, live = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert not torch.equal(kept["net.conv1.weight"], live["net.conv1.weight"])


def test_sync_batchnorm_keeps_the_activation(make_settings):
    settings = make_settings("model=timm", "model.name=mobilenetv1_100", "block=dbb",
                             "data=digits", "data.image_size=32")
    torch.manual_seed(0)
    before = randomize(Classifier(settings, list("0123456789"), 32).net).eval()
    settings.trainer.sync_batchnorm = True
    after = Classifier(settings, list("0123456789"), 32).net.eval()
    assert not any(type(m) in (nn.BatchNorm2d, BatchNormAct2d) for m in after.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in after.modules()) > 27
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(before(x), after(x))


def test_compiled_network_keeps_its_keys(make_settings):
    settings = make_settings("model=resnet20", "data=digits", "model.compile=true")
    assert "net.conv1.weight" in Classifier(settings, list("0123456789"), 8).state_dict()


@pytest.mark.parametrize(("value", "mode"), [("true", None), ("reduce-overhead", "reduce-overhead")])
def test_how_a_network_is_compiled(make_settings, monkeypatch, value, mode):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda net, **options: asked.append(options))
    Classifier(make_settings("model=resnet8", "data=digits", f"model.compile={value}"), list("0123456789"), 8)
    assert asked == [{"mode": mode}]
    with pytest.raises(ValueError, match="model.compile=fast is unknown"):
        make_settings("model=resnet8", "data=digits", "model.compile=fast")


def test_a_sweep_of_compiled_networks_stays_compiled(make_settings, monkeypatch):
    """torch.compile counts the graphs of a method, of whatever network; past a limit, it leaves the rest."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net, mode: compile_in_place(net, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for block in ("none", "acb"):
            settings = make_settings("model=resnet8", f"block={block}", "data=digits", "model.compile=true")
            assert Classifier(settings, list("0123456789"), 8)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_schedule():
    factors = [warmup_cosine(step, 20, 4) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(0)
    assert warmup_cosine(0, 10, 0) == 1


@pytest.mark.parametrize("override", ["devices=-1", "devices=[0]", "devices=abc", "devices=1.5",
                                      "accelerator=tpu", "strategy=abc", "precision=abc"])
def test_what_lightning_cannot_train_with(make_settings, tmp_path, override):
    settings = make_settings("model=resnet8", *TINY, "trainer.accelerator=cpu", f"trainer.{override}")
    with pytest.raises(ValueError, match=rf"Lightning cannot train with .*trainer.{re.escape(override)}"):
        train_script.train(settings, tmp_path)


def test_no_step_is_logged(make_settings, tmp_path):
    train_script.train(make_settings("model=resnet8", *TINY, "trainer.log_every_n_steps=0"), tmp_path)
    assert "train/loss_step" not in (tmp_path / "metrics.csv").read_text()


def test_what_does_not_fit_into_memory(make_settings, tmp_path, monkeypatch):
    giant = make_settings("model=timm", "model.name=vit_7b_patch16_dinov3", *TINY)
    with pytest.raises(ValueError, match="model.name=vit_7b_patch16_dinov3 with its gradients takes 50 GiB"):
        train_script.train(giant, tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)  # a machine of 1 MiB
    with pytest.raises(ValueError, match="data.batch_size=1400 of 8 pixels takes 0 GiB, and this mach"):
        train_script.train(make_settings("model=resnet8", *TINY, "data.batch_size=1400"), tmp_path)
