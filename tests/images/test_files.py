"""Folders, files and archives of images: what is read, what is left out, and what is refused."""

import errno
import hashlib
import os
import pickle
import resource
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

import train as train_script
from images.reading import IMAGE_ENDINGS, is_image, read_image, read_pixels
from predict import prepare
from tests.helpers import write_tree

pytestmark = pytest.mark.slow


def test_broken_input(load, tmp_path, cifar, files):
    def fails(message, *overrides, train=True):
        with pytest.raises(ValueError, match=message):
            load(*overrides, train=train)

    fails(r"no cifar10 at data\.root=.*data=digits", f"data.root={tmp_path}/nowhere", "data.download=false")
    fails(r"no images at data\.root", "data=imagenet", f"data.root={tmp_path}/nowhere")
    fails(r"batch_size=500 is larger than the 40", f"data.root={cifar}", "data.batch_size=500")
    fails(r"1 training images of data=cifar10 with data.val_size=39", f"data.root={cifar}",
          "data.batch_size=8", "data.val_size=39")
    fails("has 100 classes, but", "data=cifar100", f"data.root={cifar}")

    (files / "val" / "n99").mkdir()
    Image.new("RGB", (9, 9)).save(files / "val" / "n99" / "0.png")
    fails("classes that the training images lack: n99", "data=imagenet", f"data.root={files}")

    (cifar / "test" / "c3" / "1.png").write_bytes(b"no image")
    fails(r"unreadable image: .*c3/1\.png", f"data.root={cifar}", "data.batch_size=8", train=False)
    Image.new("RGB", (30, 32)).save(cifar / "test" / "c3" / "1.png")
    fails(r"c3/1\.png is 30x32", f"data.root={cifar}", "data.batch_size=8", train=False)


def test_odd_images(tmp_path):
    deep = Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16))
    grey, clear = Image.new("L", (4, 4), 117), Image.new("RGBA", (4, 4), (117, 117, 117, 9))
    for name, image in {"deep": deep, "grey": grey, "clear": clear}.items():
        image.save(tmp_path / f"{name}.png")
        assert read_image(tmp_path / f"{name}.png").getpixel((0, 0)) == (117, 117, 117), name
    deep.save(tmp_path / "deep.tif")
    assert read_image(tmp_path / "deep.tif").getpixel((0, 0)) == (117, 117, 117)
    (tmp_path / "wide.ppm").write_bytes(b"Pf 4 4 -1.0\n" + bytes(64))
    with pytest.raises(ValueError, match="wide.ppm .numbers of an unknown range"):
        read_image(tmp_path / "wide.ppm")
    for kind in (np.int32, np.float32):  # 0 to 255, or 65,535, or 1?
        Image.fromarray(np.full((4, 4), 117, dtype=kind)).save(tmp_path / "wide.tif")
        with pytest.raises(ValueError, match="wide.tif .numbers of an unknown range"):
            read_image(tmp_path / "wide.tif")


@pytest.mark.parametrize(("bits", "colors"), [(1, 2), (4, 2), (4, 3), (8, 2), (8, 3)])
@pytest.mark.parametrize("kind", ["bmp", "dib"])
def test_a_bitmap_of_few_colors(tmp_path, bits, kind, colors):
    """Of a palette of black and white, Pillow would read a bit for each pixel, however many there are."""
    row = {1: b"\xf0\0\0\0", 4: b"\x11\x11\0\0", 8: b"\1\1\1\1\0\0\0\0"}[bits]
    palette = bytes(4) + b"\xff\xff\xff\0" + b"\x09\0\0\0" * (colors - 2)
    content = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, bits, 0, 2 * len(row), 0, 0, colors, 0) + palette
    content += 2 * row
    if kind == "bmp":
        content = struct.pack("<2sIHHI", b"BM", 14 + len(content), 0, 0, 54 + len(palette)) + content
    file = tmp_path / f"a.{kind}"
    file.write_bytes(content)
    if bits > 1 and colors == 2:
        with pytest.raises(ValueError, match=f"a palette of greys, and {bits} bits a pixel"):
            read_pixels(str(file))
    else:
        assert read_pixels(str(file))[:, 0].tolist() == 3 * [4 * [255] + 4 * [0]]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("greys", [False, True])
@pytest.mark.parametrize("before", [b"", b"!\xfe\x03abc\x02de\0", b"\7"])
def test_a_gif_of_two_palettes(tmp_path, other, greys, before):
    """Where the first frame's has greys alone, Pillow would take that of all frames."""
    table = bytes(level for level in range(4) for _ in range(3)) if greys else bytes(range(40, 52))
    content = b"GIF89a" + struct.pack("<HHBBB", 4, 1, 0x81 if other else 0, 0, 0)
    content += bytes([200, 0, 0] * 4) if other else b""
    content += before + b"," + struct.pack("<HHHHB", 0, 0, 4, 1, 0x81) + table
    # Codes: clear, 0, 1, 2, of three bits each, then 3 and the end of four.
    bits, place = 0, 0
    for code, width in ((4, 3), (0, 3), (1, 3), (2, 3), (3, 4), (5, 4)):
        bits, place = bits | code << place, place + width
    content += b"\2\3" + bits.to_bytes(3, "little") + b"\0;"
    (tmp_path / "a.gif").write_bytes(content)
    if other and greys:
        with pytest.raises(ValueError, match="two palettes, one of greys"):
            read_pixels(str(tmp_path / "a.gif"))
    else:
        assert bytes(read_pixels(str(tmp_path / "a.gif"))[:, 0].T.flatten().tolist()) == table


def test_every_ending_of_the_list_is_read(tmp_path):
    """What Pillow writes under an ending, training and predict.py read; capitals too."""
    assert set(IMG_EXTENSIONS) < set(IMAGE_ENDINGS)
    about = {"resize": 64, "image_size": 64, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    colour = torch.tensor([200, 100, 50])
    for ending in (*IMAGE_ENDINGS, ".JPEG"):
        path = tmp_path / f"image{ending}"
        Image.new("RGB", (64, 64), tuple(colour.tolist())).save(path)
        assert is_image(path)
        assert (read_pixels(str(path)).float().mean((1, 2)) - colour).abs().max() < 2, ending
        assert (prepare(str(path), about).mean((1, 2)) * 255 - colour).abs().max() < 2, ending
    for ending in (".jp2", ".dds", ".qoi", ".avif"):  # a kilobyte of the first may take eight gigabytes
        Image.new("RGB", (64, 64)).save(tmp_path / f"image{ending}")
        (tmp_path / f"image{ending}").replace(tmp_path / "other.png")
        with pytest.raises(ValueError, match=r"unreadable image: .*other\.png"):
            read_pixels(str(tmp_path / "other.png"))
    with pytest.raises(ValueError, match=r"image\.heic does not end as an image does: \.apng \.bmp"):
        prepare(str(tmp_path / "image.heic"), about)


def test_a_damaged_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.webp", lossless=True)
    data = bytearray((tmp_path / "a.webp").read_bytes())
    for position in range(20, 60):
        data[position] ^= 255
    (tmp_path / "a.webp").write_bytes(data)
    with pytest.raises(ValueError, match=r"unreadable image: .*a\.webp"):
        read_pixels(str(tmp_path / "a.webp"))


def test_an_unreadable_folder_is_an_error(load, files, monkeypatch):
    """As root, who runs tests in containers, may read all: so the system is made to refuse."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("val/n02"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the folder .*val/n02 cannot be read \(Permission denied\)"):
        load("data=folder", f"data.root={files}", "data.image_size=16")


def test_what_is_read_and_what_is_left_out_is_printed(load, files, capsys):
    settings = ("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    (files / "train" / "n01" / "0.png").rename(files / "train" / "n01" / "0.PNG")
    Image.new("RGB", (9, 9)).save(files / "train" / "n02" / "more.jfif")
    for name in ("train/n01/a.txt", "train/n02/b.txt", "train/n02/c.HEIC", "val/n03/none", "val/lost.jpg",
                 "val/list.csv"):
        (files / name).write_bytes(b"")
    data = load(*settings)
    assert (len(data.train_set), len(data.test_set)) == (19, 18)
    printed = capsys.readouterr().out
    assert f"{files}/train: 19 images of 3 classes; skipped 3 files: .txt 2, .heic 1\n" in printed
    assert (f"{files}/val: 18 images of 3 classes; skipped 2 files: images in no class's folder 1, "
            "without an ending 1\n") in printed
    kept = files / "train" / "n01" / ".ipynb_checkpoints"
    kept.mkdir()
    for hidden in (kept / "0-checkpoint.png", files / "train" / "n01" / "._0.png"):
        hidden.write_bytes(b"")
    load(*settings)
    printed = capsys.readouterr().out
    assert "train: 19 images of 3 classes; skipped 5 files: hidden 2, .txt 2, .heic 1" in printed
    (files / "val").rename(files / "own")
    (files / "val").symlink_to("train")
    load(*settings)
    assert f"{files}/val is a link to train/: the test images are" in capsys.readouterr().out
    for path in (files / "train" / "n02").glob("*.[pj]*"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"for the classes n02.*; skipped 12 files: \.heic 8, "):
        load(*settings)


def test_images_without_a_class(load, files):
    """As ImageNet's validation images are delivered; and a tree of one class, which trains."""
    settings = ("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    for split in ("val", "train"):
        for path in (files / split).glob("n0*/*"):
            path.rename(files / split / f"ILSVRC2012_{split}_{path.parent.name[1:]}{path.name}")
        for folder in (files / split).glob("n0*"):
            folder.rmdir()
        message = rf"{split} holds 18 images and no folder of a class.*{split}/<class>"
        with pytest.raises(ValueError, match=message) as error:
            load(*settings, train=split == "train")
        assert (f"(cd {files}/val && wget -qO- https://" in str(error.value)) == (split == "val")
        (files / split / "only").mkdir()
        for path in (files / split).glob("*.png"):
            path.rename(files / split / "only" / path.name)


def test_a_tree_of_one_class_trains(make_settings, tmp_path):
    root = write_tree(tmp_path / "one", ("train", "val"), ["ant"], 6, (20, 20))
    settings = make_settings("model=resnet8", "data=folder", f"data.root={root}", "data.image_size=16",
                             "data.batch_size=4", "data.num_workers=0", "trainer.max_epochs=1", "logger=csv")
    result = train_script.train(settings, tmp_path / "run")
    assert (result["top1"], result["top5"], result["loss"], result["predictions_changed"]) == (1, 1, 0, 0)


def test_empty_class(load, files):
    (files / "train" / ".hidden").mkdir()
    load("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    (files / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_is_named(load, files, workers):
    (files / "val" / "n02" / "3.png").write_bytes(b"no image")
    data = load("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4",
                f"data.num_workers={workers}", train=False)
    with pytest.raises(ValueError, match=r"unreadable image: .*n02/3\.png"):
        list(data.test_dataloader())


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The extracted official archive, a small one, with checksums patched to its own."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 10 for i in range(20)]}
    train, test = [write("data_batch_1", batch())], [write("test_batch", batch())]
    meta = write("batches.meta", {"label_names": [f"name{i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


@pytest.mark.parametrize("download", ["true", "false"])
def test_official_archive_is_read_and_left_alone(load, archive, download):
    """Whoever runs this, root too: a lock, or any other file, would change the folder's times."""
    before = {path: path.stat().st_mtime_ns for path in (archive, *archive.rglob("*"))}
    archive.chmod(0o555)
    data = load(f"data.root={archive}", "data.batch_size=8", f"data.download={download}")
    archive.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (archive, *archive.rglob("*"))} == before
    assert data.classes[3] == "name3"
    assert data.train_set.images.shape == (20, 3, 32, 32)
    raw = pickle.loads((archive / "cifar-10-batches-py" / "test_batch").read_bytes())["data"][5]
    assert np.array_equal(data.test_set.images[5].numpy(), raw.reshape(3, 32, 32))


def test_a_damaged_archive_is_not_written_to(load, archive):
    (archive / "cifar-10-batches-py" / "test_batch").write_bytes(b"half")
    with pytest.raises(ValueError, match="no cifar10 at data.root=.*not found or corrupted"):
        load(f"data.root={archive}", "data.download=false")
    assert [path.name for path in archive.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "archive"])
def test_an_archive_is_not_unpacked_through_links(load, archive, monkeypatch, kind):
    """The packed archive lies there, whole; in place of a part, a link to somebody's file, or a pipe."""
    batches, packed = archive / "cifar-10-batches-py", archive / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(batches, batches.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    (batches / "data_batch_1").unlink()
    load(f"data.root={archive}", "data.batch_size=8")  # a part that is missing is unpacked again
    somebodys = archive / "somebodys"
    somebodys.mkdir()
    (somebodys / "file").write_text("precious")
    if kind in ("link", "pipe"):
        (batches / "data_batch_1").unlink()
        make = os.mkfifo if kind == "pipe" else (lambda place: place.symlink_to(somebodys / "file"))
        make(batches / "data_batch_1")
    else:
        shutil.rmtree(batches)
        batches.symlink_to(somebodys)
    if kind == "archive":
        batches.unlink()
        packed.unlink()
        packed.symlink_to(somebodys / "file")
    with pytest.raises(ValueError, match="would be written through .*, which is a link, a pipe or a device"):
        load(f"data.root={archive}", "data.batch_size=8")
    assert [path.name for path in somebodys.iterdir()] == ["file"]
    assert (somebodys / "file").read_text() == "precious"


def test_processes_that_load_images_may_open_many_files(load, files):
    """With 40 of them a run stood still after its first epoch."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
        data = load("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4",
                    "data.num_workers=1")
        data.train_dataloader()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_image_starts_no_other_program(tmp_path, monkeypatch):
    """Pillow has PostScript run by Ghostscript, by what is in a file, not by its name."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
                                    "showpage\n%%EOF\n")
    with pytest.raises(ValueError, match="unreadable image"):
        read_pixels(str(tmp_path / "a.png"))
    assert not (tmp_path / "started").exists()
