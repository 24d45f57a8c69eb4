"""What W&B, TensorBoard and the dashboard show of a run; read from the files that an offline run leaves."""

import json
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import wandb
from lightning_fabric.loggers import tensorboard
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.lib.service import service_process

import convert as convert_script
import dashboard
import train as train_script
from images.data import ImageData
from models.checkpoint import load_checkpoint
from runs.folder import RunFolder
from training import loggers
from training import steps as train_steps
from training.callbacks import Speed
from training.loggers import log_conversion, make_loggers, wandb_logger
from training.wandb_settings import refuse_settings_of_folder

pytestmark = pytest.mark.slow

SMALL = ("model=resnet8_dbb", "data=digits", "data.max_images=64", "data.batch_size=32",
         "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "optim.lr=0.02", "seed=3")


def content(folder) -> bytes:
    """All that was written for the server, of all sessions of the run."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*.wandb")))


def test_an_offline_wandb_run_carries_everything(make_settings, tmp_path, monkeypatch, capsys):
    settings = make_settings(*SMALL, "logger.tags=[mine]")
    seen, image, matrix = [], WandbLogger.log_image, wandb.plot.confusion_matrix

    def log_image(*args, **kwargs):
        seen.append(kwargs["caption"])
        image(*args, **kwargs)

    def confusion_matrix(**kwargs):
        seen.append(kwargs)
        return matrix(**kwargs)

    monkeypatch.setattr(WandbLogger, "log_image", log_image)
    monkeypatch.setattr(wandb.plot, "confusion_matrix", confusion_matrix)
    result = train_script.train(settings, tmp_path)
    counts, captions = seen
    data = ImageData(settings.data, settings.seed)
    data.load(train=False)
    assert counts["y_true"] == data.test_set.targets[data.test_indices].tolist()
    assert np.mean(np.array(counts["y_true"]) == counts["preds"]) == pytest.approx(result["top1"])
    mistakes = [re.fullmatch(r"(\d), taken for (\d) \((0\.\d\d)\)", caption).groups() for caption in captions]
    assert all(true != taken for true, taken, _ in mistakes)
    assert sorted((sure for *_, sure in mistakes), reverse=True) == [sure for *_, sure in mistakes]
    wandb.finish()
    settings = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", config_name="convert")
    report = convert_script.convert(settings, tmp_path / "convert")
    log_conversion(report, settings, tmp_path / "convert", RunFolder(tmp_path))
    said = f"logger=wandb: run {settings.logger.id} of project {settings.logger.project}\n"
    assert capsys.readouterr().out.count(said) == 1, "a file may name another one"
    wandb.teardown()  # as at the end of the process: the service has then written everything
    ids = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, "one run"
    written = content(tmp_path / "wandb")
    for name in ("resnet8_dbb_s3", "resnet8_digits", "mine", "exact", "test/top1", "train/loss", "lr-SGD",
                 "convolutions", "share/blocks.0.conv1/1x1_kxk", "gamma/blocks.0.conv1/1x1_avg",
                 "confusion_matrix", "wrongly_classified", "final/converted_top1", "max_epochs",
                 "convert/report", "convert/after/top1", f"converted-{settings.logger.id}",
                 "model.safetensors", "model.onnx"):
        assert name.encode() in written, name
    metrics = (tmp_path / "metrics.csv").read_text()
    assert "gamma/" not in metrics.splitlines()[0]
    assert "final/top1" in metrics, "the metrics of the training are still there"
    wrong = round((1 - result["top1"]) * 64)
    assert len(list((tmp_path / "wandb").glob("*/files/media/images/wrongly_classified*"))) == min(wrong, 36)


def test_tensorboard_that_is_not_installed_costs_no_run(make_settings, tmp_path, monkeypatch, capsys):
    for package in ("TENSORBOARD", "TENSORBOARDX"):
        monkeypatch.setattr(tensorboard, f"_{package}_AVAILABLE", False)
    made = make_loggers(make_settings(*SMALL, "logger=tensorboard"), RunFolder(tmp_path))
    assert len(made) == 1
    assert isinstance(made[0], CSVLogger)
    assert "logger=tensorboard: it is not installed" in capsys.readouterr().out


def test_tensorboard_shows_the_same_scalars(make_settings, tmp_path):
    train_script.train(make_settings(*SMALL, "logger=tensorboard", "block.init=single"), tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    names = set(metrics.columns) - {"epoch", "step"}
    assert names <= set(events.Tags()["scalars"])
    assert "share/conv1/kxk" in events.Tags()["scalars"]
    weights = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    gamma = weights["net.blocks.0.conv1.branches.1x1.bn.weight"]
    assert events.Scalars("gamma/blocks.0.conv1/1x1")[-1].value == pytest.approx(gamma.abs().mean().item())
    assert (gamma < 0).any()
    for name in ("train/loss_epoch", "test/top1", "final/converted_top1"):
        shown = [event.value for event in events.Scalars(name)]
        assert shown == pytest.approx(metrics[name].dropna().tolist())


def test_loggers(make_settings, tmp_path):
    assert len(make_loggers(make_settings("data=digits", "logger=csv"), RunFolder(tmp_path))) == 1
    assert len(make_loggers(make_settings("data=digits"), RunFolder(tmp_path))) == 2

    def named(*options):
        found = wandb_logger(make_settings("data=digits", *options), RunFolder(tmp_path))._wandb_init
        return found["name"], found["group"], found["tags"]
    assert named("model=resnet8") == ("resnet8_none_s0", "resnet8_digits", ["resnet8", "digits", "none"])
    options = ("block.mode=online", "logger.group=ours", "logger.tags=[mine]", "seed=3")
    tags = ["resnet8", "digits", "dbb", "online", "mine"]
    assert named("model=resnet8_dbb", *options) == ("resnet8_dbb_s3", "ours", tags)
    wandb.finish()


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """W&B as in a new process, without a key or a mode."""
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.finish()
    wandb.teardown()


def test_a_server_that_cannot_be_reached_costs_no_run(no_key, make_settings, tmp_path, monkeypatch, capsys):
    """A key, and nobody who answers: offline, after a wait that is known."""
    assert loggers.WANDB_WAIT <= 10
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(loggers, "WANDB_WAIT", 2)
    start = time.monotonic()
    train_script.train(make_settings(*SMALL), tmp_path)
    assert time.monotonic() - start < 60, "W&B's own wait is 90 seconds"
    wandb.finish()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("logger=wandb")]
    assert re.search(r"W&B did not start \(.*\): the run goes on offline; later: wandb sync", line)
    assert b"final/top1" in content(tmp_path / "wandb")


def test_online_without_a_key_costs_no_run(no_key, make_settings, tmp_path, monkeypatch, capsys):
    """And no code is saved: by git, in a folder whose .git may be a stranger's, and name programs."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    logger = wandb_logger(make_settings(*SMALL, "logger.id=abc"), RunFolder(tmp_path))
    assert logger.experiment.settings.mode == "offline"
    assert logger.experiment.settings.save_code is False
    assert "did not start (No API key configured" in capsys.readouterr().out


@pytest.mark.parametrize(("variable", "value", "knob", "left"), [
    ("WANDB_API_KEY", "short", "logger.offline=false", 2),
    ("WANDB_MODE", "nonsense", "logger.offline=false", 1),
    ("WANDB_MODE", "offline", "logger.project=a/b:c", 1)])
def test_whatever_wandb_raises_costs_no_run(no_key, make_settings, tmp_path, monkeypatch, capsys, variable,
                                            value, knob, left):
    monkeypatch.setenv(variable, value)
    loggers = make_loggers(make_settings(*SMALL, knob, "logger.id=abc"), RunFolder(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("logger=wandb: W&B did not start")]
    assert len(loggers) == left
    assert ("the run goes on without W&B" in lines[-1]) == (left == 1)


def test_a_run_that_wandb_leaves_alone_trains_and_converts(make_settings, tmp_path, monkeypatch):
    def broken(**kwargs):
        raise OSError("no space left")
    monkeypatch.setattr(wandb, "init", broken)
    result = train_script.train(make_settings(*SMALL), tmp_path)
    assert result["top1"] == json.loads((tmp_path / "result.json").read_text())["top1"]
    settings = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", config_name="convert")
    log_conversion({}, settings, tmp_path, RunFolder(tmp_path))


def test_a_helper_of_wandb_that_dies_costs_no_run(make_settings, tmp_path, monkeypatch, capsys):
    """As it does where a machine has no memory left. Nor does it cost the next job of a sweep its W&B."""
    wandb.teardown()
    helpers, start, callbacks = [], service_process.start, train_steps.make_callbacks

    class WithoutHelper(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                helpers[0].kill()
                helpers[0].wait()

    def watched(*args):
        process = start(*args)
        helpers.append(process._process)
        return process
    with monkeypatch.context() as patch:
        patch.setattr(service_process, "start", watched)
        patch.setattr(train_steps, "make_callbacks", lambda *args: [*callbacks(*args), WithoutHelper()])
        result = train_script.train(make_settings(*SMALL), tmp_path / "one")
        loggers.finish()
    assert result["top1"] == json.loads((tmp_path / "one" / "result.json").read_text())["top1"]
    printed = capsys.readouterr().out
    assert printed.count("WandbLogger failed (") == 1
    assert "converted: top1" in printed
    train_script.train(make_settings(*SMALL), tmp_path / "two")
    loggers.finish()
    assert "failed" not in capsys.readouterr().out
    wandb.teardown()
    assert b"final/top1" in content(tmp_path / "two" / "wandb")


@pytest.mark.parametrize(("logger", "broken"), [
    ("tensorboard", (TensorBoardLogger, "log_metrics")), ("wandb", (WandbLogger, "log_table")),
    ("wandb", (wandb.plot, "confusion_matrix"))])
def test_a_logger_that_fails_in_mid_run_costs_no_run(make_settings, tmp_path, monkeypatch, capsys, logger,
                                                     broken):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(*broken, full)
    train_script.train(make_settings(*SMALL, f"logger={logger}"), tmp_path)
    printed = capsys.readouterr().out
    assert "Logger failed ([Errno 28] No space left on device): the run goes on without it" in printed
    assert "converted: top1" in printed
    assert "final/top1" in (tmp_path / "metrics.csv").read_text()


def test_a_conversion_that_wandb_does_not_take_is_written(make_settings, tmp_path, monkeypatch, capsys):
    train_script.train(make_settings(*SMALL, "logger=csv"), tmp_path)
    settings = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", "logger=wandb", "export=[]",
                             config_name="convert")
    report = convert_script.convert(settings, tmp_path / "convert")

    def gone(*args, **kwargs):
        raise wandb.errors.CommError("the server is gone")
    monkeypatch.setattr(wandb.Artifact, "add_file", gone)
    log_conversion(report, settings, tmp_path / "convert", RunFolder(tmp_path))
    assert "WandbLogger failed (the server is gone)" in capsys.readouterr().out


def test_speed_leaves_out_the_first_step(make_settings, monkeypatch):
    """Steps of an epoch that end at 10, 12, 13 and 17 seconds: three of 7/3 seconds."""
    clock, logged = iter([10.0, 12.0, 13.0, 17.0]), {}
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    settings = make_settings("data=digits", "data.batch_size=21")
    module = SimpleNamespace(log=logged.__setitem__, settings=settings)
    speed = Speed()
    speed.on_train_epoch_start(None, module)
    for step in range(4):
        speed.on_train_batch_end(None, module, None, None, step)
    speed.on_train_epoch_end(None, module)
    assert logged["train/seconds_per_step"] == pytest.approx(7 / 3)
    assert logged["train/images_per_second"] == pytest.approx(9)


def test_the_dashboard_shows_what_runs_log(make_settings, tmp_path, monkeypatch):
    definition = dashboard.make_workspace("someone", "dbb")._to_model().model_dump_json()
    train_script.train(make_settings(*SMALL, "logger=csv"), tmp_path)
    logged = set(pd.read_csv(tmp_path / "metrics.csv").columns)
    shown = {name for name in logged if f'"{name}"' in definition}
    assert shown == {"epoch", "test/top1", "test/loss", "train/loss_epoch", "train/seconds_per_step",
                     "train/peak_memory_mib", "final/top1", "final/converted_top1",
                     "final/predictions_changed", "final/activations_mib"}
    for name in ("^lr-", "^share/", "^gamma/", "convert/report", "wrongly_classified"):
        assert name in definition
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--project", "dbb"])
    monkeypatch.setattr(wandb, "Api", lambda: (_ for _ in ()).throw(wandb.errors.UsageError("no key")))
    with pytest.raises(SystemExit, match="error: W&B did not take the dashboard"):
        dashboard.main()


@pytest.mark.parametrize("text", [
    "[default]\nbase_url = http://127.0.0.1:1", "[default]\n  entity=evil",
    "[default]\nBASE_URL: http://127.0.0.1",
    "[default]\nproject = a\nhttps_proxy = http://127.0.0.1:1\ninsecure_disable_ssl = true", "base_url = no"])
def test_the_folder_does_not_say_to_whom_wandb_sends(make_settings, tmp_path, monkeypatch, text):
    """W&B follows a settings file in the current folder, which may be a stranger's run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(text)
    with pytest.raises(ValueError, match="wandb/settings says to whom, or how, W&B sends"):
        wandb_logger(make_settings("model=resnet8", "logger=wandb"), RunFolder(tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--project", "dbb"])
    with pytest.raises(SystemExit, match="wandb/settings says to whom"):
        dashboard.main()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = mine\nmode = offline\n")
    refuse_settings_of_folder()
    (tmp_path / "wandb" / "settings").unlink()
    os.mkfifo(tmp_path / "wandb" / "settings")
    with pytest.raises(ValueError, match="is no small file"):
        refuse_settings_of_folder()


def test_a_conversion_sends_what_it_wrote(tmp_path):
    """Beside it may lie anything, such as a link to a secret."""
    for name in ("model.onnx", "graphs.png", "report.json", "report.md", "report.png"):
        (tmp_path / name).write_bytes(b"")
    sent, picture = [], loggers.wandb.Image
    artifact = SimpleNamespace(add_file=lambda path, name: sent.append(name))
    report = {"files": {"model.onnx": {}}, "hub": [], "about": {}, "predictions_changed": 0, "ties": 0,
              "relative_error": 0.0, "before": {}, "after": {}}
    run = SimpleNamespace(log=lambda values: None, summary={}, id="a", log_artifact=lambda artifact: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "rows", lambda report: [])
        patch.setattr(loggers.wandb, "Image", lambda path: None)
        patch.setattr(loggers.wandb, "Artifact", lambda *args, **kwargs: artifact)
        loggers._send_conversion(run, report, tmp_path)
        assert sorted(sent) == ["model.onnx", "report.json", "report.md", "report.png"]
        loggers._send_conversion(run, report | {"graphs": {}}, tmp_path)
        assert "graphs.png" in sent
    assert loggers.wandb.Image is picture
