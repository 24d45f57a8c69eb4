"""The three scripts, end to end, in this process and as a user starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn

import convert as convert_script
import eval as eval_script
import train as train_script
from dbb import branches
from models import build_model
from tests.conftest import ROOT, randomize
from training.checkpoint import load_checkpoint
from training.module import Classifier, warmup_cosine

TINY = ("data=digits", "trainer.max_epochs=1", "trainer.limit_train_batches=8", "optim.lr=0.02", "logger=csv")


def run(script, *overrides, cwd, env=()):
    """Start a script as a user does."""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"OMP_NUM_THREADS": "1"} | dict(env)
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *overrides], cwd=cwd, capture_output=True, text=True,
                          env=env, timeout=300, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of resnet20_dbb started from the command line: its folder and what it printed."""
    cwd = tmp_path_factory.mktemp("run")
    done = run("train.py", "model=resnet20_dbb", *TINY[:-1], cwd=cwd,
               env={"WANDB_API_KEY": "", "HOME": str(cwd), "NETRC": str(cwd / "none")})
    assert done.returncode == 0, done.stderr
    [folder] = (cwd / "outputs" / "resnet20_dbb_digits").iterdir()
    return folder, done.stdout


def test_train_eval_and_convert_agree(trained, make_settings):
    folder, printed = trained
    ckpt = f"ckpt={folder}/checkpoints/last.ckpt"
    result = eval_script.evaluate(make_settings(ckpt, config_name="eval"))
    assert f"test top1 {result['top1']:.4f}" in printed
    report = convert_script.convert(make_settings(ckpt, "export=[]", config_name="convert"), folder / "convert")
    for when in ("before", "after"):
        assert {key: report[when][key] for key in ("top1", "top5")} == {key: result[key] for key in ("top1", "top5")}
    assert (report["predictions_changed"], report["images"]) == (0, 360)
    assert 0 < report["relative_error"] < 1e-5
    assert json.loads((folder / "convert" / "report.json").read_text()) == report

    plain = build_model("resnet20", 10, image_size=8)
    assert report["before"]["parameters"] == sum(p.numel() for p in build_model("resnet20", 10, "dbb", 8).parameters())
    # Each 3x3 convolution of the plain network, written out; the classifier has 64 * 10.
    macs = [8 * 8 * 9 * (3 * 16 + 6 * 16 * 16), 4 * 4 * 9 * (16 * 32 + 5 * 32 * 32), 2 * 2 * 9 * (32 * 64 + 5 * 64 * 64), 640]
    assert report["after"]["macs"] == sum(macs)
    assert report["before"]["macs"] > 2.2 * sum(macs)
    assert report["after"]["parameters"] == sum(p.numel() for n, p in plain.named_parameters() if "bn" not in n) + 16 + 6 * 112

    plain.load_state_dict(load_file(folder / "convert" / "model.safetensors"))


def test_a_run_leaves_what_it_promises(trained):
    folder, printed = trained
    assert {"config.yaml", "metrics.csv", "checkpoints", "wandb"} <= {path.name for path in folder.iterdir()}
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_epoch", "test/loss", "test/top1", "test/top5", "train/images_per_second", "train/seconds_per_step",
            "train/peak_memory_mib", "final/top1"} <= set(header)
    assert list((folder / "wandb").glob("offline-run-*/*.wandb")), "without a key W&B runs offline, and asks nobody"
    assert "epoch 1/1" in printed
    assert "19 of 19 convolutions became blocks" in printed
    assert "=" not in "".join(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["dbb"]["settings"]["model"] == {
        "name": "resnet20", "pretrained": False, "weights": None, "channels_last": False, "compile": False}
    assert (folder / "convolutions.csv").read_text().splitlines()[:2] == ["module,kernel_size,block,reason,norm",
                                                                          "conv1,3x3,kxk + 1x1 + 1x1_avg + 1x1_kxk,,bn1"]
    assert checkpoint["dbb"]["settings"]["logger"]["id"]


def test_convert_from_the_command_line(trained, make_settings, tmp_path):
    folder, _ = trained
    ckpt = f"ckpt={folder}/checkpoints/last.ckpt"
    done = run("convert.py", ckpt, "export=[]", f"out={tmp_path}/out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 of 360 predictions changed" in done.stdout
    written = ["model.safetensors", "report.json", "report.md", "report.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(ValueError, match="the conversion changed the network"):
        convert_script.convert(make_settings(ckpt, "export=[]", "tolerance=1e-12", config_name="convert"), tmp_path / "strict")
    assert [path.name for path in (tmp_path / "strict").iterdir()] == ["report-failed.json"]


def test_wrong_conversion_writes_no_weights(trained, make_settings, tmp_path, monkeypatch):
    folder, _ = trained
    good = branches.fuse_conv_norm
    monkeypatch.setattr(branches, "fuse_conv_norm", lambda k, b, mean, *rest: good(k, b, 0 * mean, *rest))
    with pytest.raises(ValueError, match="no weights were written"):
        convert_script.convert(make_settings(f"ckpt={folder}/checkpoints/last.ckpt", "export=[]", config_name="convert"), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_bad_checkpoints(trained, make_settings, tmp_path):
    folder, _ = trained
    good = folder / "checkpoints" / "last.ckpt"

    def fails(message, *overrides):
        with pytest.raises(ValueError, match=message):
            eval_script.evaluate(make_settings(*overrides, config_name="eval"))

    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "short.ckpt").write_text("abc")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"dbb": nn.Linear(2, 2)}, tmp_path / "pickled.ckpt")
    fails("no such file", f"ckpt={tmp_path}/none.ckpt")
    fails("cannot be read", f"ckpt={tmp_path}/cut.ckpt")
    fails("cannot be read", f"ckpt={tmp_path}/text.ckpt")
    fails("cannot be read", f"ckpt={tmp_path}/short.ckpt")
    fails("not written by train.py", f"ckpt={tmp_path}/other.ckpt")
    fails("not written by train.py", f"ckpt={tmp_path}/list.ckpt")
    fails("cannot be read", f"ckpt={tmp_path}/pickled.ckpt")
    fails("is needed")
    fails("another network: .* missing .* unexpected", f"ckpt={good}", "block=acb")
    fails("cannot be used with ckpt", f"ckpt={good}", "experiment=demo")
    fails("cannot be used with ckpt", f"ckpt={good}", "model.weights=x.pth")

    from tests.test_data import write_tree
    tree = write_tree(tmp_path / "tree", ("train", "val"), ["a", "b"], 2, (8, 8))
    fails("trained for 10 classes, but data=folder has 2", f"ckpt={good}", "data=folder", f"data.root={tree}")

    checkpoint = torch.load(good, weights_only=True)
    checkpoint["dbb"]["settings"]["trainer"]["callbacks"] = "os.system"
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    fails("callbacks", f"ckpt={tmp_path}/odd.ckpt")


def test_a_second_run_does_not_overwrite_the_first(trained, make_settings):
    folder, _ = trained
    with pytest.raises(ValueError, match="already holds a run"):
        train_script.train(make_settings("model=resnet20", *TINY), folder)


@pytest.mark.parametrize(("overrides", "message"), [
    (["data=digits", "data.batch_size=5000"], "error: data.batch_size=5000 is larger"),
    (["data=digits", "out=/proc/nothing/here"], "error: out: cannot write into /proc/nothing/here"),
    (["model=timm"], "error: model.name"), (["model=resnet19"], "resnet18"), (["+trainer.max_epoch=3"], "max_epoch")])
def test_errors_are_sentences(tmp_path, overrides, message):
    done = run("train.py", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.*"))


def test_a_mistyped_checkpoint_takes_nothing_away(tmp_path):
    (tmp_path / "here").mkdir()
    assert "no such file" in run("train.py", "ckpt=nope", cwd=tmp_path / "here").stderr
    assert (tmp_path / "here").is_dir()


def test_a_list_of_branches_from_the_command_line(make_settings, tmp_path, capsys):
    done = run("train.py", "model=resnet20", *TINY, "trainer.limit_train_batches=2", "block.branches=[kxk,1x1,1xk,kx1]",
               "block.layers=[{modules:blocks.0.*,branches:[]}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "17 3x3 became kxk + 1x1 + 1xk + kx1" in " ".join(done.stdout.split())
    [folder] = (tmp_path / "outputs" / "resnet20_custom_digits").iterdir()
    ckpt = f"ckpt={folder}/checkpoints/last.ckpt"
    report = convert_script.convert(make_settings(ckpt, "data=none", "export=[]", config_name="convert"), folder / "convert")
    assert (report["predictions_changed"], report["images"]) == (0, 64)
    convert_script.print_tables(report)
    printed = capsys.readouterr().out
    assert "no accuracy was measured" in printed
    assert "top1" not in printed
    assert "top1" not in json.loads((folder / "convert" / "report.json").read_text())["before"]
    with pytest.raises(ValueError, match="data=none has no labels"):
        eval_script.evaluate(make_settings(ckpt, "data=none", config_name="eval"))


def test_a_mode_is_a_choice_of_training_alone(make_settings, tmp_path, capsys):
    """It is told, goes into the checkpoint, and may be another one afterwards; OREPA's block has weights of its own."""
    trained = train_script.train(make_settings("model=resnet20_dbb", "block.mode=online", "block.positions=64", *TINY), tmp_path / "online")
    assert "block.mode=online: expect a training step of 2.0 times the plain resnet20's time" in capsys.readouterr().out
    ckpt = f"ckpt={tmp_path}/online/checkpoints/last.ckpt"
    assert load_checkpoint(ckpt.removeprefix("ckpt="))["dbb"]["settings"]["block"]["mode"] == "online"
    for mode in ((), ("block.mode=exact",)):
        result = eval_script.evaluate(make_settings(ckpt, *mode, config_name="eval"))
        assert result == {key: pytest.approx(trained[key], rel=1e-6) for key in ("top1", "top5", "loss")}
    assert "changed from the checkpoint: block.mode: online -> exact" in capsys.readouterr().out
    train_script.train(make_settings(ckpt, "block.mode=exact", "trainer.max_epochs=2"), tmp_path / "online")

    train_script.train(make_settings("model=resnet20", "block=orepa", *TINY), tmp_path / "orepa")
    ckpt = f"ckpt={tmp_path}/orepa/checkpoints/last.ckpt"
    report = convert_script.convert(make_settings(ckpt, "export=[]", config_name="convert"), tmp_path / "orepa" / "convert")
    assert report["predictions_changed"] == 0
    assert report["after"]["top1"] == report["before"]["top1"]
    with pytest.raises(ValueError, match="another network"):
        eval_script.evaluate(make_settings(ckpt, "block.mode=exact", config_name="eval"))


@pytest.mark.parametrize("extra", [
    ("block=acb", "optim.ema_decay=0.5"),
    ("trainer.precision=bf16-mixed", "model.channels_last=true", "trainer.gradient_clip_val=1.0"),
    ("model=timm", "model.name=mobilenetv3_small_050", "block=dbb", "data.image_size=32", "data.val_size=50"),
    ("block=none", "trainer.precision=bf16-true")], ids=["acb and ema", "bf16", "timm", "plain bf16-true"])
def test_options(make_settings, tmp_path, extra):
    model = [] if any(o.startswith("model=") for o in extra) else ["model=resnet20_dbb"]
    result = train_script.train(make_settings(*model, *TINY, "trainer.limit_train_batches=2", *extra), tmp_path)
    ckpt = f"ckpt={tmp_path}/checkpoints/last.ckpt"
    report = convert_script.convert(make_settings(ckpt, "export=[]", config_name="convert"), tmp_path / "convert")
    assert report["predictions_changed"] == 0
    assert report["before"]["top1"] == result["top1"]


def test_ema_is_what_is_kept(make_settings, tmp_path):
    train_script.train(make_settings("model=resnet20", *TINY, "optim.ema_decay=0.5"), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    kept, live = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert not torch.equal(kept["net.conv1.weight"], live["net.conv1.weight"])


def test_sync_batchnorm_keeps_the_activation(make_settings):
    settings = make_settings("model=timm", "model.name=mobilenetv1_100", "data=digits", "data.image_size=32", "block=dbb")
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


def test_a_sweep_of_compiled_networks_stays_compiled(make_settings, monkeypatch):
    """torch.compile counts the graphs of a forward method, whatever network it is of, and past a limit leaves the rest uncompiled."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: compile_in_place(net, backend="eager"))
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
