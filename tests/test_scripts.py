"""The three scripts, end to end, in this process and as a user starts them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import convert as convert_script
import eval as eval_script
import train as train_script
from dbb import branch
from models import build_model
from models.checkpoint import load_checkpoint
from reports.conversion import print_tables
from tests.helpers import ROOT, TINY, call, run, write_tree

LOADING = """
import sys
sys.path.insert(0, {root!r})
from images.data import ImageData
from settings.cli import plain_errors
from settings.schema import DataConf
data = ImageData(DataConf("folder", root={files!r}, image_size=16, batch_size=4, num_workers=2), 0)
data.load(train=False)
with plain_errors():
    list(data.test_dataloader())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of resnet8_dbb started from the command line: its folder and what it printed."""
    cwd = tmp_path_factory.mktemp("run")
    done = run("train.py", "model=resnet8_dbb", *TINY[:-1], cwd=cwd,
               env={"WANDB_API_KEY": "", "HOME": str(cwd), "NETRC": str(cwd / "none")})
    assert done.returncode == 0, done.stderr
    [folder] = (cwd / "outputs" / "resnet8_dbb_digits").iterdir()
    return folder, done.stdout


@pytest.fixture
def convert(make_settings):
    """Convert a checkpoint into a folder; of the files, only what every conversion writes."""
    def convert(ckpt, out, *overrides):
        settings = make_settings(f"ckpt={ckpt}", "export=[]", *overrides, config_name="convert")
        return convert_script.convert(settings, out)
    return convert


def test_train_eval_and_convert_agree(trained, make_settings, convert):
    folder, printed = trained
    ckpt = folder / "checkpoints" / "last.ckpt"
    result = eval_script.evaluate(make_settings(f"ckpt={ckpt}", config_name="eval"))
    assert f"test top1 {result['top1']:.4f}" in printed
    report = convert(ckpt, folder / "convert")
    for when in ("before", "after"):
        assert [report[when][key] for key in ("top1", "top5")] == [result[key] for key in ("top1", "top5")]
    assert (report["predictions_changed"], report["images"]) == (0, 360)
    assert 0 < report["relative_error"] < 1e-5
    assert json.loads((folder / "convert" / "report.json").read_text()) == report

    plain, blocks = build_model("resnet8", 10, image_size=8), build_model("resnet8", 10, "dbb", 8)
    assert report["before"]["parameters"] == sum(p.numel() for p in blocks.parameters())
    # Each 3x3 convolution of the plain network, written out; the classifier has 64 * 10.
    macs = [8 * 8 * 9 * (3 * 16 + 2 * 16 * 16), 4 * 4 * 9 * (16 * 32 + 32 * 32),
            2 * 2 * 9 * (32 * 64 + 64 * 64), 640]
    assert report["after"]["macs"] == sum(macs)
    assert report["before"]["macs"] > 2.2 * sum(macs)
    without_norms = sum(p.numel() for name, p in plain.named_parameters() if "bn" not in name)
    assert report["after"]["parameters"] == without_norms + 16 + 2 * 112

    plain.load_state_dict(load_file(folder / "convert" / "model.safetensors"))


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(trained):
    folder, printed = trained
    assert {"config.yaml", "metrics.csv", "checkpoints", "wandb"} <= {path.name for path in folder.iterdir()}
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_epoch", "test/loss", "test/top1", "test/top5", "train/images_per_second",
            "train/seconds_per_step", "train/peak_memory_mib", "final/top1"} <= set(header)
    offline = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert offline, f"without a key W&B runs offline, and asks nobody: {printed}"
    assert "epoch 1/1" in printed
    assert "7 of 7 convolutions became blocks" in printed
    assert "=" not in "".join(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["dbb"]["settings"]["model"] == {
        "name": "resnet8", "pretrained": False, "weights": None, "channels_last": False, "compile": False}
    assert (folder / "convolutions.csv").read_text().splitlines()[:2] == [
        "module,kernel_size,block,reason,norm", "conv1,3x3,kxk + 1x1 + 1x1_avg + 1x1_kxk,,bn1"]
    assert checkpoint["dbb"]["settings"]["logger"]["id"]


@pytest.mark.slow
def test_convert_from_the_command_line(trained, convert, tmp_path):
    """Of another checkpoint than the last: its conversion has a folder of its own."""
    ckpt = trained[0] / "checkpoints" / "kept.ckpt"
    shutil.copy(ckpt.with_name("last.ckpt"), ckpt)
    done = call("convert.py", f"ckpt={ckpt}", "export=[]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 of 360 predictions changed" in done.stdout
    written = ["model.safetensors", "report.json", "report.md", "report.png"]
    assert sorted(path.name for path in (trained[0] / "convert-kept.ckpt").iterdir()) == written
    assert not (tmp_path / "outputs").exists()
    shutil.copytree(trained[0], tmp_path / "outputs" / "elsewhere")
    shutil.copy(ckpt, tmp_path / "elsewhere.ckpt")
    done = call("convert.py", "ckpt=elsewhere.ckpt", "export=[]", cwd=tmp_path)
    assert "outputs/elsewhere is the folder of a run that did not write elsewhere.ckpt" in done.stderr
    with pytest.raises(ValueError, match="the conversion changed the network"):
        convert(ckpt, tmp_path / "strict", "tolerance=1e-12")
    assert [path.name for path in (tmp_path / "strict").iterdir()] == ["report-failed.json"]


@pytest.mark.slow
def test_wrong_conversion_writes_no_weights(trained, convert, tmp_path, monkeypatch):
    good = branch.norm_affine
    monkeypatch.setattr(branch, "norm_affine", lambda mean, *rest: good(0 * mean, *rest))
    with pytest.raises(ValueError, match="no weights were written"):
        convert(trained[0] / "checkpoints" / "last.ckpt", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
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

    tree = write_tree(tmp_path / "tree", ("train", "val"), ["a", "b"], 2, (8, 8))
    fails("trained for 10 classes, but data=folder has 2", f"ckpt={good}", "data=folder", f"data.root={tree}")

    checkpoint = torch.load(good, weights_only=True)
    checkpoint["dbb"]["settings"]["trainer"]["callbacks"] = "os.system"
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    fails("callbacks", f"ckpt={tmp_path}/odd.ckpt")


@pytest.mark.slow
def test_a_second_run_does_not_overwrite_the_first(trained, make_settings):
    folder, _ = trained
    with pytest.raises(ValueError, match="already holds a run"):
        train_script.train(make_settings("model=resnet8", *TINY), folder)


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "message"), [
    (["data=digits", "data.batch_size=5000"], "error: data.batch_size=5000 is larger"),
    (["data=digits", "out=/proc/nothing/here"], "error: out: cannot write into /proc/nothing/here"),
    (["model=timm"], "error: model.name"), (["model=resnet19"], "resnet18"),
    (["+trainer.max_epoch=3"], "max_epoch")])
def test_errors_are_sentences(tmp_path, overrides, message):
    done = call("train.py", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_a_mistyped_checkpoint_takes_nothing_away(tmp_path):
    (tmp_path / "here").mkdir()
    done = call("train.py", "ckpt=nope", cwd=tmp_path / "here")
    assert done.returncode == 1
    assert "error: ckpt=nope: there is no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "here").is_dir()


@pytest.mark.slow
def test_a_damaged_test_image_ends_the_process(tmp_path):
    """Though the processes that load images take a first SIGTERM for a whole job's, and go on."""
    files = write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 4, (20, 20))
    image = files / "val" / "a" / "3.png"
    image.write_bytes(image.read_bytes()[:100])
    (tmp_path / "script.py").write_text(LOADING.format(root=ROOT, files=str(files)))
    done = run(tmp_path / "script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unreadable image: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_list_of_branches_from_the_command_line(make_settings, convert, tmp_path, capsys):
    branches = ["block.branches=[kxk,1x1,1xk,kx1]", "block.layers=[{modules:blocks.0.*,branches:[]}]"]
    done = call("train.py", "model=resnet8", *TINY, "trainer.limit_train_batches=2", *branches, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 3x3 became kxk + 1x1 + 1xk + kx1" in " ".join(done.stdout.split())
    [folder] = (tmp_path / "outputs" / "resnet8_custom_digits").iterdir()
    ckpt = folder / "checkpoints" / "last.ckpt"
    report = convert(ckpt, folder / "convert", "data=none")
    assert (report["predictions_changed"], report["images"]) == (0, 64)
    print_tables(report)
    printed = capsys.readouterr().out
    assert "no accuracy was measured" in printed
    assert "top1" not in printed
    assert "top1" not in json.loads((folder / "convert" / "report.json").read_text())["before"]
    with pytest.raises(ValueError, match="data=none has no labels"):
        eval_script.evaluate(make_settings(f"ckpt={ckpt}", "data=none", config_name="eval"))
