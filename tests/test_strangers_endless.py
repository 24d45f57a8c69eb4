"""Files of strangers that would fill a memory, or that no reader comes to the end of."""

import inspect
import json
import math
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict

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
from images.sources import FileImages, Tree
from models import limits
from models.checkpoint import load_checkpoint
from models.plain import damage
from models.reading import read_weights
from reports.runs import read_epochs, read_runs
from reports.study import POINTS, draw_curves
from runs.folder import RunFolder
from training.metrics import csv_logger


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)


@pytest.mark.parametrize("name", ["data.pkl", "data.PKL"])
def test_pickles_by_any_name(tmp_path, name):
    """PyTorch's reader finds them in capitals too."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr(f"archive/{name}", pickle.dumps({"a": Large()}, protocol=2))
        file.writestr("archive/version", "3")
    assert "bytearray" in damage(tmp_path / "a.pth")


class Blinded:
    """An OrderedDict whose own `values` and `get` are others."""

    def __reduce__(self):
        items = iter({"a": ["x" * 1000] * 10**4}.items())
        return OrderedDict, (), {"values": OrderedDict, "get": "x"}, None, items


def test_attributes_of_a_dict(tmp_path):
    torch.save(Blinded(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="an OrderedDict with attributes"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_weights(tmp_path / "a.pth")
    assert "an OrderedDict with attributes" in str(error.value.__cause__)


def test_runs_without_an_epoch_in_common(tmp_path):
    """A table of all epochs by all runs would take 200 MB."""
    rows = [{"variant": "a", "folder": str(run), "epoch": 300 * run + epoch, "train_loss": 1.0,
             "test_top1": math.nan} for run in range(300) for epoch in range(300)]
    tracemalloc.start()
    variants = pd.DataFrame({"variant": ["a"], "seconds": [math.nan]})
    draw_curves(pd.DataFrame(rows), variants, tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_curves_of_a_million_epochs(tmp_path, monkeypatch):
    """Of which matplotlib would draw every one."""
    plot, seen = Axes.plot, []
    monkeypatch.setattr(Axes, "plot", lambda *args, **how: seen.append(len(args[1])) or plot(*args, **how))
    epochs = pd.DataFrame({"variant": "none", "folder": "a", "epoch": range(10**6), "train_loss": 1.0,
                           "test_top1": 0.5})
    draw_curves(epochs, pd.DataFrame({"seconds": [float("nan")]}), tmp_path / "a.png")
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
        with pytest.raises(ValueError, match=f"unreadable image: .*{name} .there is no file; a pipe"):
            read_pixels(str(tmp_path / name))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "report.json")
        with pytest.raises(ValueError, match="what stands there is of no earlier conversion"):
            require_place(tmp_path, ["model.onnx"])
        (tmp_path / "report.json").unlink()


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


def test_images_that_would_fill_the_memory(tmp_path):
    for size, name in (((3000, 3000), "large.jp2"),
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


def test_a_zip_that_readers_read_otherwise(tmp_path):
    """Python looks for its list of contents before its end, PyTorch where the end says that it is."""
    file = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, file)
    content = file.read_bytes()
    assert damage(file) is None
    for changed in (b"PK\x03\x04" + content, content[:-2] + b"\x01\x00x"):
        file.write_bytes(changed)
        assert "its list of contents is not where its end says" in damage(file)


def test_a_zip_whose_parts_share_their_bytes(tmp_path):
    """One pickle under many names would be followed as often."""
    file = tmp_path / "a.ckpt"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", b"\x80\x02X\x10\x27\x00\x00" + b"a" * 10_000 + b".")
        made.filelist *= 300
    assert damage(file) == "its parts share their bytes"
    with zipfile.ZipFile(file, "w") as made:
        for name in ("a/data.pkl", "a/more.pkl"):
            made.writestr(name, b"\x80\x02N.")
    assert damage(file) == "it does not hold one pickle, or two parts by one name"


def test_the_old_format_has_all_values(tmp_path):
    """What it lacks would be what the memory had; and as tar, PyTorch would read it first."""
    file = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert damage(file) is None
    content = file.read_bytes()
    start = content.rindex(b"\x80\x02]")  # the list of what follows
    nested = b"])" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(60)) + b"a"
    for keys in (b"]", nested, b"])" + b"\x85" * 10**5 + b"a"):
        file.write_bytes(content[:start] + b"\x80\x02" + keys + b".")
        assert damage(file) == "it does not have the values of all its tensors"
    header = tarfile.TarInfo("N.N.N.N.N.").tobuf()
    file.write_bytes(header + bytes(1024))
    assert damage(file) == "it is an archive of tar"


def test_values_under_many_spellings_of_a_name(tmp_path):
    """PyTorch finds a part of a zip in capitals, too, and reads it as often as it is named."""
    torch.save([torch.ones(2), torch.ones(3)], tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as read, zipfile.ZipFile(tmp_path / "b.pth", "w") as made:
        for name in read.namelist():
            if not name.endswith("data/1"):
                made.writestr(name.replace("a/data/0", "a/data/1"), read.read(name))
    assert damage(tmp_path / "b.pth") == "it does not have the values of all its tensors"
    with zipfile.ZipFile(tmp_path / "b.pth", "a") as made:
        for name in ("a/data/0", "A/data/0"):
            made.writestr(name, b"")
    assert damage(tmp_path / "b.pth") == "it does not hold one pickle, or two parts by one name"


def test_files_that_python_2_wrote(tmp_path):
    """Its memo begins with 1, its OrderedDicts are calls with a list, and its texts are bytes."""
    pickled = b"ccollections\nOrderedDict\nq\x01]q\x02]q\x03(U\x01aq\x04K\x05ea\x85q\x05Rq\x06"
    file = tmp_path / "a.pth"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", b"\x80\x02" + pickled + b".")
        made.writestr("a/version", "3")
        made.writestr("a/byteorder", "little")
    assert damage(file) is None
    assert torch.load(file, weights_only=True) == {"a": 5}


def test_one_text_named_often(tmp_path):
    text = "a" * 10_000
    torch.save({"dbb": {"settings": {"a": [text] * 1000}}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="tensors and texts are larger than what the file holds"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_a_pickle_of_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "OPERATIONS", 100)
    torch.save([{}] * 200, tmp_path / "a.pth")
    assert "takes more than 100 steps to read" in damage(tmp_path / "a.pth")


@pytest.mark.parametrize("text", ["\n" + "," * 3000 + "\n" + "0,1\n" * 300_000, "0,1,2\r" * 10**6,
                                  "\n" * 10**6])
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


def test_tiles_of_a_small_image(tmp_path):
    """464 bytes whose tiles would take 1.5 GB each."""
    tags = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (277, 1), (322, 40_000), (323, 40_000),
            (324, 400), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head.ljust(400, b"\0") + bytes(64))
    with pytest.raises(ValueError, match="a.tif .its tiles are too large"):
        read_pixels(str(tmp_path / "a.tif"))


def test_tiles_that_only_one_reader_sees(tmp_path):
    """Pillow leaves out numbers of a type that it does not know, which libtiff reads."""
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1), (322, 17, 8),
            (322, 4, 16), (323, 17, 8), (323, 4, 16), (324, 4, 8), (325, 4, 256)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = struct.pack("<2sHIq", b"II", 42, 264, 46_000).ljust(264, b"\0")
    (tmp_path / "a.tif").write_bytes(content + struct.pack("<H", len(tags)) + entries + bytes(4))
    with pytest.raises(ValueError, match="its tiles are described twice"):
        read_pixels(str(tmp_path / "a.tif"))


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
