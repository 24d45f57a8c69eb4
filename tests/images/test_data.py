"""Data on small trees made here: order, augmentation, shares of processes, and every kind of broken input."""

import errno
import hashlib
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import train as train_script
from images.data import ImageData, KeySampler, crop_and_flip
from images.reading import IMAGE_ENDINGS, is_image, read_image, read_pixels
from images.sources import lighting
from predict import prepare
from tests.helpers import write_tree
from training.module import Classifier

pytestmark = pytest.mark.slow


@pytest.fixture
def cifar(tmp_path):
    return write_tree(tmp_path / "cifar", ("train", "test"), [f"c{i}" for i in range(10)], 4, (32, 32))


@pytest.fixture
def files(tmp_path):
    return write_tree(tmp_path / "files", ("train", "val"), ["n01", "n02", "n03"], 6, (50, 40))


def load(make_settings, *overrides, train=True, seed=0):
    data = ImageData(make_settings(*overrides).data, seed)
    data.load(train)
    return data


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = [data.on_after_batch_transfer(batch) for batch in loader]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_are_split_once_and_for_all(make_settings):
    first, second = (load(make_settings, "data=digits", seed=seed) for seed in (0, 7))
    assert (len(first.train_set), len(first.test_set)) == (1437, 360)
    assert torch.equal(first.test_set.images, second.test_set.images)
    assert min(torch.bincount(first.test_set.targets)) >= 34, "stratified"
    train = {bytes(image.numpy().tobytes()) for image in first.train_set.images}
    assert not any(image.numpy().tobytes() in train for image in first.test_set.images)


@pytest.mark.parametrize("source", ["digits", "cifar10", "imagenet"])
def test_epoch_depends_on_seed_and_epoch_alone(make_settings, cifar, files, source):
    root = {"digits": [], "cifar10": [f"data.root={cifar}"],
            "imagenet": [f"data.root={files}", "data.image_size=32", "data.color_jitter=true",
                         "data.lighting=true", "data.trivial_augment=true"]}[source]

    def images(workers, epoch, seed=0, batch_size=4):
        data = load(make_settings, f"data={source}", *root, f"data.batch_size={batch_size}",
                    f"data.num_workers={workers}", seed=seed)
        torch.rand(7)  # the history of the global generator does not matter
        return epoch_of(data, epoch)

    plain = images(0, 1)
    for other in (images(2, 1), images(0, 1, batch_size=2)):
        n = min(len(plain[0]), len(other[0]))
        assert torch.equal(plain[0][:n], other[0][:n])
        assert torch.equal(plain[1][:n], other[1][:n])
    for other in (images(0, 2), images(0, 1, seed=1)):
        assert not torch.equal(plain[0], other[0])


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_is_pad_crop_mirror(flip):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 6, 5), dtype=torch.uint8)
    moves = torch.stack([torch.randint(5, (40,)), torch.randint(5, (40,)), torch.randint(1 + flip, (40,))], 1)
    moved = crop_and_flip(images, moves, 2)
    for image, (row, column, mirror), actual in zip(images, moves, moved, strict=True):
        expected = torch.nn.functional.pad(image, [2] * 4)[:, row:row + 6, column:column + 5]
        assert torch.equal(actual, expected.flip(2) if mirror else expected)


def test_moves_cover_all_shifts(make_settings):
    data = load(make_settings, "data=digits")
    moves = data.train_set.moves(0)
    a_pixel_each_way = {(row, column, 0) for row in range(3) for column in range(3)}
    assert {tuple(move) for move in moves.tolist()} == a_pixel_each_way, "never mirrored"


def test_normalisation(make_settings):
    data = load(make_settings, "data=digits", "data.mean=[0.5,0.25,0]", "data.std=[0.5,1,2]", train=False)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    images, targets = data.on_after_batch_transfer((white, torch.tensor([3])))
    assert images[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.75, 0.5])
    assert targets.tolist() == [3]


@pytest.mark.parametrize(("n", "world_size"), [(10, 1), (10, 3), (9, 3), (2, 4)])
def test_shares_of_processes(n, world_size):
    def keys(shuffle, epoch=0):
        samplers = [KeySampler(torch.arange(n), shuffle, 0, rank, world_size, epoch)
                    for rank in range(world_size)]
        lengths = {len(list(sampler)) for sampler in samplers}
        assert len(lengths) == 1, "as many for each, else processes wait for each other"
        return [key for sampler in samplers for key in sampler]
    counted = [index for _, index, real in keys(shuffle=False) if real]
    assert sorted(counted) == list(range(n)), "every test image is counted once"
    trained = [index for _, index, _ in keys(shuffle=True)]
    assert len(set(trained)) == len(trained) == n // world_size * world_size


def test_filling_images_do_not_count(make_settings):
    data = load(make_settings, "data=digits", train=False)
    _, targets = data.test_set.__getitems__([(0, 5, True), (0, 6, False)])
    assert targets.tolist() == [int(data.test_set.targets[5]), -1]


def test_held_out_images(make_settings, cifar):
    data = load(make_settings, f"data.root={cifar}", "data.val_size=12", "data.batch_size=28")
    assert not set(data.val_indices.tolist()) & set(data.train_indices.tolist())
    assert len(data.val_indices) + len(data.train_indices) == 40
    images, _ = next(iter(data.val_dataloader()[1]))
    assert torch.equal(images, data.train_set.images[data.val_indices]), "not augmented"


def test_process_shares_divide_the_batch(make_settings):
    data = load(make_settings, "data=digits", "data.batch_size=64")
    data.trainer = SimpleNamespace(global_rank=1, world_size=4)
    assert data.train_dataloader().batch_size == 16
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    with pytest.raises(ValueError, match=r"data\.batch_size=64.*3 processes"):
        data.train_dataloader()


def test_image_size_resizes(make_settings, cifar):
    data = load(make_settings, f"data.root={cifar}", "data.batch_size=8", "data.image_size=16")
    assert data.image_size == 16
    assert load(make_settings, "data=digits", "data.image_size=32").train_set.images.shape[1:] == (3, 32, 32)


def test_images_are_moved_by_less_than_they_are_wide(make_settings):
    conf = make_settings("model=resnet8", "data=digits", "data.crop_padding=8").data
    with pytest.raises(ValueError, match="data.crop_padding=8 must be less than the side of the images, 8"):
        ImageData(conf, 0).load(train=True)


def test_tree_of_files(make_settings, files):
    data = load(make_settings, "data=imagenet", f"data.root={files}", "data.image_size=32",
                "data.batch_size=4", "data.num_workers=0")
    assert data.classes == ["n01", "n02", "n03"]
    images, targets = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    with Image.open(files / "val" / "n01" / "0.png") as image:  # resize to 256/224 of 32, centre crop
        resized = image.resize((round(50 / 40 * 37), 37), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 32) / 2), round((37 - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 3


def test_lighting_is_one_shift_of_colour():
    torch.manual_seed(0)
    image = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    shifts = torch.stack([lighting(image)[:, 0, 0].float() - 128 for _ in range(2000)])
    assert (lighting(image).flatten(1).float().std(1) == 0).all()
    # The standard deviation of a channel: sqrt(sum_i (vector_i * value_i)^2) * 0.1 * 255
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = np.sqrt(((vectors * np.array([0.2175, 0.0188, 0.0045])) ** 2).sum(1)) * 25.5
    assert shifts.std(0).tolist() == pytest.approx(expected.tolist(), rel=0.1)


def test_broken_input(make_settings, tmp_path, cifar, files):
    def fails(message, *overrides, train=True):
        with pytest.raises(ValueError, match=message):
            load(make_settings, *overrides, train=train)

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
    with pytest.raises(ValueError, match=r"image\.heic does not end as an image does: \.apng \.avif"):
        prepare(str(tmp_path / "image.heic"), about)


def test_a_damaged_image_is_named(tmp_path):
    """Pillow's AVIF reader raises a RuntimeError."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    for position in range(90, 150):
        data[position] ^= 255
    (tmp_path / "a.avif").write_bytes(data)
    with pytest.raises(ValueError, match=r"unreadable image: .*a\.avif"):
        read_pixels(str(tmp_path / "a.avif"))


def test_an_unreadable_folder_is_an_error(make_settings, files, monkeypatch):
    """As root, who runs tests in containers, may read all: so the system is made to refuse."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("val/n02"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the folder .*val/n02 cannot be read \(Permission denied\)"):
        load(make_settings, "data=folder", f"data.root={files}", "data.image_size=16")


def test_what_is_read_and_what_is_left_out_is_printed(make_settings, files, capsys):
    settings = ("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    (files / "train" / "n01" / "0.png").rename(files / "train" / "n01" / "0.PNG")
    Image.new("RGB", (9, 9)).save(files / "train" / "n02" / "more.jfif")
    for name in ("train/n01/a.txt", "train/n02/b.txt", "train/n02/c.HEIC", "val/n03/none", "val/lost.jpg",
                 "val/list.csv"):
        (files / name).write_bytes(b"")
    data = load(make_settings, *settings)
    assert (len(data.train_set), len(data.test_set)) == (19, 18)
    printed = capsys.readouterr().out
    assert f"{files}/train: 19 images of 3 classes; skipped 3 files: .txt 2, .heic 1\n" in printed
    assert (f"{files}/val: 18 images of 3 classes; skipped 2 files: images in no class's folder 1, "
            "without an ending 1\n") in printed
    kept = files / "train" / "n01" / ".ipynb_checkpoints"
    kept.mkdir()
    for hidden in (kept / "0-checkpoint.png", files / "train" / "n01" / "._0.png"):
        hidden.write_bytes(b"")
    load(make_settings, *settings)
    printed = capsys.readouterr().out
    assert "train: 19 images of 3 classes; skipped 5 files: hidden 2, .txt 2, .heic 1" in printed
    for path in (files / "train" / "n02").glob("*.[pj]*"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"for the classes n02.*; skipped 12 files: \.heic 8, "):
        load(make_settings, *settings)


def test_images_without_a_class(make_settings, files):
    """As ImageNet's validation images are delivered; and a tree of one class, which trains."""
    settings = ("data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    for split in ("val", "train"):
        for path in (files / split).glob("n0*/*"):
            path.rename(files / split / f"ILSVRC2012_{split}_{path.parent.name[1:]}{path.name}")
        for folder in (files / split).glob("n0*"):
            folder.rmdir()
        message = rf"{split} holds 18 images and no folder of a class.*{split}/<class>"
        with pytest.raises(ValueError, match=message) as error:
            load(make_settings, *settings, train=split == "train")
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


def test_empty_class(make_settings, files):
    (files / "train" / ".hidden").mkdir()
    load(make_settings, "data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")
    (files / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load(make_settings, "data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_is_named(make_settings, files, workers):
    (files / "val" / "n02" / "3.png").write_bytes(b"no image")
    data = load(make_settings, "data=folder", f"data.root={files}", "data.image_size=16", "data.batch_size=4",
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
def test_official_archive_is_read_and_left_alone(make_settings, archive, download):
    """Whoever runs this, root too: a lock, or any other file, would change the folder's times."""
    before = {path: path.stat().st_mtime_ns for path in (archive, *archive.rglob("*"))}
    archive.chmod(0o555)
    data = load(make_settings, f"data.root={archive}", "data.batch_size=8", f"data.download={download}")
    archive.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (archive, *archive.rglob("*"))} == before
    assert data.classes[3] == "name3"
    assert data.train_set.images.shape == (20, 3, 32, 32)
    raw = pickle.loads((archive / "cifar-10-batches-py" / "test_batch").read_bytes())["data"][5]
    assert np.array_equal(data.test_set.images[5].numpy(), raw.reshape(3, 32, 32))


def test_a_damaged_archive_is_not_written_to(make_settings, archive):
    (archive / "cifar-10-batches-py" / "test_batch").write_bytes(b"half")
    with pytest.raises(ValueError, match="no cifar10 at data.root=.*not found or corrupted"):
        load(make_settings, f"data.root={archive}", "data.download=false")
    assert [path.name for path in archive.iterdir()] == ["cifar-10-batches-py"]


def test_some_images_of_every_class(make_settings, files):
    data = load(make_settings, "data=imagenet", f"data.root={files}", "data.image_size=32",
                "data.batch_size=2", "data.max_images=6", "data.num_workers=0")
    assert torch.bincount(torch.tensor(data.test_set.tree.targets)[data.test_indices]).tolist() == [2, 2, 2]
    assert torch.bincount(torch.tensor(data.train_set.tree.targets)[data.train_indices]).tolist() == [2, 2, 2]
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 6
    for few in (("data.max_images=32",), ("data.val_size=5000",)):
        message = rf"data.batch_size=64 is larger than the \d+ training images of data=digits with {few[0]}"
        with pytest.raises(ValueError, match=message):
            load(make_settings, "data=digits", "data.batch_size=64", *few)
    everything = load(make_settings, "data=digits", "data.max_images=5000")
    assert len(everything.test_indices) == 360


def test_mixed_batches(make_settings):
    images, targets = torch.arange(8.0)[:, None, None, None].expand(-1, 3, 8, 8), torch.arange(8)
    classes = [str(i) for i in range(8)]
    assert Classifier(make_settings("model=resnet8", "data=digits"), classes, 8).mix is None
    torch.manual_seed(0)
    for knob, alpha in (("data.mixup=0.4", v2.MixUp), ("data.cutmix=0.6", v2.CutMix)):
        mix = Classifier(make_settings("model=resnet8", "data=digits", knob), classes, 8).mix
        [only] = mix.transforms
        assert (type(only), only.alpha) == (alpha, float(knob[-3:]))
        mixed, soft = mix(images, targets)
        assert soft.sum(1).tolist() == pytest.approx([1.0] * 8)
        shares = soft @ torch.arange(8.0)
        assert torch.allclose(shares, mixed.mean((1, 2, 3)), atol=1e-5), "as much of a target as of its image"
        assert not torch.equal(mixed, images)


@pytest.mark.parametrize(("overrides", "message"), [
    (["data=digits", "data.mixup=-1"], "data.mixup=-1.0 must be at least 0"),
    (["data=digits", "data.trivial_augment=true"], "no such option"),
    (["data=imagenet", "data.on_device=true"], "no such option"),
    (["data=digits", "data.on_device=true", "data.num_workers=1"], "must be 0"),
    (["data=digits", "data.max_images=0"], "data.max_images=0 must be"),
    (["data.image_size=0"], "data.image_size=0 must be"),
    (["data.mixup=inf"], "data.mixup=inf must be a finite"),
    (["optim.lr=nan"], "optim.lr=nan must be a finite"), (["optim.momentum=2"], "optim.momentum=2.0 must be"),
    (["optim.lr_batch_size=0"], "optim.lr_batch_size=0 must be"),
    (["trainer.accumulate_grad_batches=0"], "accumulate_grad_batches=0 must be")])
def test_knobs_that_make_no_sense(make_settings, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_settings(*overrides)
