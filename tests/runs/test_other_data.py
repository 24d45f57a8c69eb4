"""A run that goes on with other images, or whose files have moved or changed."""

import hashlib
import json

import pytest
import torch

import train as train_script
from models import build_model
from models.checkpoint import load_checkpoint
from tests.helpers import TINY, write_tree
from tests.runs.stopping import At, Batches, place, terminate

pytestmark = pytest.mark.slow


def test_other_images(make_settings, train_with, tmp_path, capsys):
    """Between two epochs they are noted; within one, what is done of it would be of others."""
    files = write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 8, (40, 40))
    settings = make_settings("model=resnet8", "data=folder", f"data.root={files}", "data.image_size=32",
                             "data.batch_size=4", "data.num_workers=0", "logger=csv", "trainer.max_epochs=3")
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 1, terminate))
    gone = files / "train" / "b" / "7.png"
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match="images: 16 until epoch 0, then 15: this can .* after 2 batches"):
        train_with(settings, tmp_path / "run")
    gone.write_bytes(content)
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 3, terminate))
    assert place(tmp_path / "run") == (1, 0)
    for number in range(8, 12):
        (files / "train" / "b" / f"{number}.png").write_bytes(content)
    batches = Batches()
    capsys.readouterr()
    train_with(settings, tmp_path / "run", batches)
    assert "changed: training images: 16 until epoch 1, then 20\n" in capsys.readouterr().out
    assert batches.seen == [(epoch, batch) for epoch in (1, 2) for batch in range(5)]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["changed"] == ["training images: 16 until epoch 1, then 20"]
    about = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["dbb"]
    assert {name: result[name] for name in ("image_digest", "test_digest")}.items() <= about.items()


def test_a_data_set_that_moved(make_settings, train_with, tmp_path, capsys):
    """With a link in its old place, which is typed as before, nothing has changed."""
    write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 4, (40, 40))
    words = ("model=resnet8", "data=folder", f"data.root={tmp_path}/files", "data.image_size=32",
             "data.batch_size=4", "data.num_workers=0", "logger=csv", "trainer.max_epochs=2")
    with pytest.raises(SystemExit, match="143"):
        train_with(make_settings(*words), tmp_path / "run", At(0, 1, terminate))
    (tmp_path / "files").rename(tmp_path / "moved")
    (tmp_path / "files").symlink_to("moved")
    config = tmp_path / "run" / "config.yaml"
    assert f"root: {tmp_path}/files\n" in config.read_text()
    config.write_text(config.read_text().replace("max_epochs: 2", "max_epochs: 7"))  # edited, too
    capsys.readouterr()
    train_with(make_settings(f"ckpt={tmp_path}/run/checkpoints/last.ckpt"), tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"{config} says trainer.max_epochs=7, which is not taken" in printed
    assert "data.root=" not in printed
    for more in ((), (f"data.root={tmp_path}/moved",)):  # where the link leads is the same place
        result = train_with(make_settings(*words, *more), tmp_path / "run")
        assert "is finished" in capsys.readouterr().out
        assert "changed" not in result


def test_weights_of_the_start_are_told_apart(make_settings, train_with, tmp_path):
    """By what their file was when training began, also after going on."""
    weights = tmp_path / "plain.pt"
    torch.save(build_model("resnet8", 10, image_size=8).state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    settings = make_settings("model=resnet8", *TINY, f"model.weights={weights}", "trainer.max_epochs=2")
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 1, terminate))
    weights.write_bytes(b"another")
    train_with(settings, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["weights_digest"] == digest


def test_other_images_of_the_same_number(make_settings, train_with, tmp_path, capsys):
    """One that got another class, say: the order of all behind it is another, and which are held out."""
    files = write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 8, (40, 40))
    settings = make_settings("model=resnet8", "data=folder", f"data.root={files}", "data.image_size=32",
                             "data.batch_size=4", "data.num_workers=0", "logger=csv", "trainer.max_epochs=2",
                             "data.val_size=2", "data.max_images=12")
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 1, terminate))
    (files / "train" / "b" / "7.png").rename(files / "train" / "a" / "8.png")
    with pytest.raises(ValueError, match="others, or of other classes.*: this can .* after 2 batches"):
        train_with(settings, tmp_path / "run")
    (files / "train" / "a" / "8.png").rename(files / "train" / "b" / "7.png")
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 2, terminate))
    assert place(tmp_path / "run") == (1, 0)
    (files / "train" / "b" / "7.png").rename(files / "train" / "a" / "8.png")
    (files / "val" / "b" / "7.png").rename(files / "val" / "b" / "8.png")
    capsys.readouterr()
    train_with(settings, tmp_path / "run")
    said = [f"{split} images: others, or of other classes, after epoch 1"
            for split in ("training", "test")]
    assert f"changed: {said[0]}, and others are held out\nchanged: {said[1]}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["changed"] == said


def test_other_test_images(make_settings, train_with, tmp_path):
    files = write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 8, (40, 40))
    settings = make_settings("model=resnet8", "data=folder", f"data.root={files}", "data.image_size=32",
                             "data.batch_size=4", "data.num_workers=0", "logger=csv", "trainer.max_epochs=1")
    with pytest.raises(SystemExit, match="143"):
        train_with(settings, tmp_path / "run", At(0, 1, terminate))
    (files / "val" / "b" / "7.png").unlink()
    train_script.train(settings, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["changed"] == ["test images: 16 until epoch 0, then 15"]
