"""Files of strangers that would fill a memory, or that no reader comes to the end of."""

import inspect
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import save_file

from export.files import load_network
from export.place import require_place
from images.data import ImageData
from images.reading import read_pixels
from images.sources import FileImages
from images.tree import Tree
from models import limits
from models.reading import read_weights
from reports.runs import read_epochs, read_runs
from reports.study import POINTS, draw_curves
from runs.folder import RunFolder
from settings.cli import refuse_matplotlibrc
from tests.helpers import ROOT
from training.metrics import csv_logger


def test_runs_without_an_epoch_in_common(tmp_path):
    """A table of all epochs by all runs would take 200 MB."""
    rows = [{"variant": "a", "folder": str(run), "epoch": 300 * run + epoch, "train_loss": 1.0,
             "test_top1": math.nan} for run in range(300) for epoch in range(300)]
    tracemalloc.start()
    variants = pd.DataFrame({"variant": ["a"], "top1": [50.0], "seconds": [math.nan]})
    draw_curves(pd.DataFrame(rows), variants, tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_curves_of_a_million_epochs(tmp_path, monkeypatch):
    """Of which matplotlib would draw every one."""
    plot, seen = Axes.plot, []
    monkeypatch.setattr(Axes, "plot", lambda *args, **how: seen.append(len(args[1])) or plot(*args, **how))
    epochs = pd.DataFrame({"variant": "none", "folder": "a", "epoch": range(10**6), "train_loss": 1.0,
                           "test_top1": 0.5})
    variants = pd.DataFrame({"variant": ["none"], "top1": [50.0], "seconds": [math.nan]})
    draw_curves(epochs, variants, tmp_path / "a.png")
    assert 1000 < max(seen) <= POINTS


def test_a_tree_of_large_images(tmp_path, make_settings, monkeypatch):
    """Sizes are compared before an image is decoded: the second has no pixels."""
    for split in ("train", "test"):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        for name, size in (("a", (30, 30)), ("b", (40, 40))):
            Image.new("RGB", size).save(folder / f"{name}.png")
        (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    conf = make_settings("model=resnet8", "data=cifar10", f"data.root={tmp_path}").data
    with pytest.raises(ValueError, match="b.png is 40x40 pixels, but others are 30x30; data=folder takes"):
        ImageData(conf, 0).load(train=False)
    monkeypatch.setattr(limits, "IMAGES_BYTES", 3000)
    with pytest.raises(ValueError, match="a.png is 30x30 pixels; 2 such images would take"):
        ImageData(conf, 0).load(train=False)


def test_hdf5_that_unpacks_to_more(tmp_path):
    """One value whose compressed chunk holds more; one text that is named often."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", shape=(4,), maxshape=(None,), chunks=(10**6,), dtype="f4",
                            compression="gzip")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["a"] = np.array(["text"] * 4, dtype=h5py.string_dtype())
    for name in ("a.h5", "b.h5"):
        with pytest.raises(ValueError, match="cannot be read") as error:
            read_weights(tmp_path / name)
        assert "compressed, or holds more than numbers" in str(error.value.__cause__)


def test_short_lines_of_many_columns(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("epoch,step,train/loss_epoch" + ",a" * 2000 + "\n" + "0,1,2.0\n" * 10_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="lines that are cut, or have other columns than its first: 10000"):
        read_epochs(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "10,000 rows of 2,000 columns would be 160 MB"


def test_a_tree_whose_links_lead_back(tmp_path):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / "1").symlink_to(".")
    (folder / "2").symlink_to(".")
    with pytest.raises(ValueError, match="is in .*val twice, by a link"):
        Tree(tmp_path / "val", ["a"])
    (folder / "1").unlink()
    (folder / "2").unlink()
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "1.png")
    (folder / "1").symlink_to(tmp_path / "more")
    assert len(Tree(tmp_path / "val", ["a"])) == 2


def test_pipes_and_devices(tmp_path):
    """Nobody waits for what comes through them, or reads them to the end."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/ptmx")
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match=f"unreadable image: .*{name} .there is no file .a pipe"):
            read_pixels(str(tmp_path / name))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "report.json")
        with pytest.raises(ValueError, match="what stands there is of no earlier conversion"):
            require_place(tmp_path, ["model.onnx"])
        (tmp_path / "report.json").unlink()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.write_bytes(b"font.size: 9\n\xff")])
def test_a_matplotlibrc_that_is_no_text(tmp_path, monkeypatch, make):
    """In the current folder, where matplotlib looks first."""
    monkeypatch.chdir(tmp_path)
    refuse_matplotlibrc()
    make(tmp_path / "matplotlibrc")
    with pytest.raises(ValueError, match="matplotlibrc in this folder"):
        refuse_matplotlibrc()
    # In a process of their own: it is what they do before imports.
    for script in ("eval.py", "report.py", "tools/keep_runs.py", "tools/run_picture.py"):
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), "x"], cwd=tmp_path, timeout=60,
                              capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: matplotlibrc in this folder")


def test_a_checkpoint_does_not_choose_the_test_images_in_silence(make_settings, capsys):
    data = ImageData(make_settings("model=resnet8", "data=digits", "data.max_images=3").data, 0)
    data.load(train=False)
    assert "data.max_images=3: 3 of 360 test images are taken" in capsys.readouterr().out


def test_a_header_that_names_a_giant(tmp_path):
    about = {"model": "vit_7b_patch16_dinov3", "classes": ["a"], "image_size": 224, "resize": 256,
             "mean": [0.5] * 3, "std": [0.5] * 3}
    for more, message in (({}, "has 6,7.* parameters, the file 1"), ({"image_size": 6000}, "no header"),
                          ({"mean": [math.nan] * 3}, "no header"), ({"std": [math.inf] * 3}, "no header"),
                          ({"classes": ["a"] * (limits.CLASSES + 1)}, "no header")):
        save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors", {"dbb": json.dumps(about | more)})
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path / "a.safetensors")


def test_a_header_of_more_text_than_any(tmp_path, monkeypatch):
    """Whose JSON takes twenty times its length."""
    monkeypatch.setattr(limits, "HEADER", 10)
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(1)}, path, {"dbb": json.dumps({"x": [[]] * 10})})
    for read, message in ((load_network, "no header"), (read_weights, "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_small_image_in_a_large_file(tmp_path):
    """It has holes, which take no room on a disk; some readers take a whole file at once."""
    path = tmp_path / "a.webp"
    Image.new("RGB", (64, 64)).save(path)
    read_pixels(str(path))
    os.truncate(path, limits.IMAGE_BYTES + 1)
    with pytest.raises(ValueError, match="the file is too large"):
        read_pixels(str(path))


def test_images_that_would_fill_the_memory(tmp_path):
    for size, name in (((5000, 5000), "large.ppm"),
                       ((1, 60_000), "long.png"), ((20_000, 10), "wide.jpg"), ((12_000, 12_000), "large.png"),
                       ((13_000, 12_000), "large.jpg")):
        Image.new("L", size).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} .* pixels"):
            read_pixels(str(tmp_path / name))


def test_an_image_that_resizing_would_make_large(tmp_path, make_settings):
    """As `predict.py` refuses it; a training image is cropped first."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("L", (256, 1)).save(tmp_path / "train" / "a" / "long.png")
    conf = make_settings("model=resnet8", "data=folder", f"data.root={tmp_path}", "data.image_size=512",
                         "data.crop_pct=0.1").data
    images = FileImages(Tree(tmp_path / "train", ["a"]), conf, 0, augment=True)
    assert images.__getitems__([(0, 0, True)])[0][0].shape == (3, 512, 512)
    with pytest.raises(ValueError, match="long.png has sides of 1 and 256 pixels: resized to 5120"):
        images.without_augmentation().__getitems__([(0, 0, True)])


def test_an_alias_bomb_in_a_runs_folder(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "result.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="result.json is damaged"):
        RunFolder(tmp_path).read_result()


@pytest.mark.parametrize("text", ["\n" + "," * 3000 + "\n" + "0,1\n" * 300_000, "0,1,2\r" * 10**6,
                                  "\n" * 10**6, "0\n" * 70_000])
def test_metrics_that_unpack_to_more(tmp_path, monkeypatch, text):
    monkeypatch.setattr(limits, "CELLS", 2**18)
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("epoch,step,train/loss_epoch\n" + text)
    tracemalloc.start()
    for read in (lambda: read_epochs(folder), lambda: csv_logger(folder)):
        with pytest.raises(ValueError, match="more than 262,144 values"):
            read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_jpeg_of_many_exif_parts(tmp_path):
    """Pillow joins them one by one; a few are what cameras write."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    content, part = (tmp_path / "a.jpg").read_bytes(), b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0"
    (tmp_path / "a.jpg").write_bytes(content[:2] + 3 * part + content[2:])
    assert read_pixels(str(tmp_path / "a.jpg")).shape == (3, 8, 8)
    (tmp_path / "a.jpg").write_bytes(content[:2] + 300 * part + content[2:])
    with pytest.raises(ValueError, match="a.jpg .its Exif data has too many parts"):
        read_pixels(str(tmp_path / "a.jpg"))


def test_a_jpeg_of_many_scans(tmp_path):
    """Each passes over all pixels; an image that is shown in steps has about ten."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    assert content.count(b"\xff\xda") > 5
    assert read_pixels(str(tmp_path / "a.jpg")).shape == (3, 8, 8)
    last = content[content.rindex(b"\xff\xda"):-2]
    (tmp_path / "a.jpg").write_bytes(content[:-2] + 200 * last + content[-2:])
    with pytest.raises(ValueError, match="a.jpg .it has too many scans"):
        read_pixels(str(tmp_path / "a.jpg"))


def test_a_ppm_of_many_comments(tmp_path):
    """For each of them Pillow goes through the rest of a megabyte again."""
    for comments in (3, 300):
        content = b"P3\n4 4\n255\n" + comments * b"# made by hand\n" + b"1 " * 48
        (tmp_path / f"{comments}.ppm").write_bytes(content)
    assert read_pixels(str(tmp_path / "3.ppm")).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="300.ppm .it has too many comments"):
        read_pixels(str(tmp_path / "300.ppm"))
    Image.new("RGB", (32, 32), "#232323").save(tmp_path / "a.ppm")  # of bytes that are the same sign
    assert read_pixels(str(tmp_path / "a.ppm")).shape == (3, 32, 32)


def test_a_part_of_cifar_that_is_a_hole(tmp_path, make_settings):
    """All of it would be read, to be told from the true one by its checksum."""
    part = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    part.parent.mkdir()
    part.touch()
    os.truncate(part, 2**42)
    data = ImageData(make_settings("model=resnet8", "data=cifar10", f"data.root={tmp_path}").data, 0)
    with pytest.raises(ValueError, match="data_batch_1 is larger than all of cifar10: remove it"):
        data.load(train=True)


def test_folders_in_folders(tmp_path):
    """More of them than Python's functions may call themselves."""
    (tmp_path / "val" / "a" / "/".join("a" * 200)).mkdir(parents=True)
    usual = sys.getrecursionlimit()
    for read in (lambda: Tree(tmp_path / "val", ["a"]), lambda: read_runs([tmp_path])):
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        try:
            with pytest.raises(ValueError, match="nested too deep"):
                read()
        finally:
            sys.setrecursionlimit(usual)
