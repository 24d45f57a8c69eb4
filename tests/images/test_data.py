"""Data on small trees made here: order, augmentation, and shares of processes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from images.data import ImageData, KeySampler, crop_and_flip
from images.sources import lighting
from tests.helpers import write_tree
from training.module import Classifier

pytestmark = pytest.mark.slow


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = [data.on_after_batch_transfer(batch) for batch in loader]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_are_split_once_and_for_all(load):
    first, second = (load("data=digits", seed=seed) for seed in (0, 7))
    assert (len(first.train_set), len(first.test_set)) == (1437, 360)
    assert torch.equal(first.test_set.images, second.test_set.images)
    assert min(torch.bincount(first.test_set.targets)) >= 34, "stratified"
    train = {bytes(image.numpy().tobytes()) for image in first.train_set.images}
    assert not any(image.numpy().tobytes() in train for image in first.test_set.images)


def test_other_images_in_memory_have_another_hash(make_settings, tmp_path):
    """Also if a tree has as many, of the same names: with a label mended, or a picture."""
    write_tree(tmp_path, ("train", "test"), "0123456789", 2, (8, 8))
    words, seen = ["model=resnet8", "data=cifar10", f"data.root={tmp_path}", "data.batch_size=4"], []
    conf = make_settings(*words).data
    picture = tmp_path / "train" / "3" / "1.png"
    for change in (lambda: None, lambda: None, lambda: Image.new("RGB", (8, 8)).save(picture),
                   lambda: picture.rename(tmp_path / "train" / "4" / "9.png")):
        change()
        data = ImageData(conf, 0)
        data.load(train=True)
        seen.append(data.digests)
    assert seen[0] == seen[1]
    assert len({names["image_digest"] for names in seen}) == 3
    assert len({names["test_digest"] for names in seen}) == 1


def test_images_of_another_split_have_another_hash(make_settings, tmp_path):
    """Of `test/`, until there is a `val/`, perhaps with the same names; wherever the tree lies."""
    seen = []
    for root, splits in (("a", ("train", "test")), ("b", ("train", "test")), ("a", ("val",))):
        write_tree(tmp_path / root, splits, "xy", 2, (8, 8))
        conf = make_settings("model=resnet8", "data=folder", f"data.root={tmp_path / root}",
                             "data.image_size=8", "data.batch_size=2").data
        data = ImageData(conf, 0)
        data.load(train=True)
        seen.append(data.digests)
    assert seen[0] == seen[1]
    assert seen[0]["image_digest"] == seen[2]["image_digest"]
    assert seen[0]["test_digest"] != seen[2]["test_digest"]


@pytest.mark.parametrize("source", ["digits", "cifar10", "imagenet"])
def test_epoch_depends_on_seed_and_epoch_alone(load, cifar, files, source):
    root = {"digits": [], "cifar10": [f"data.root={cifar}"],
            "imagenet": [f"data.root={files}", "data.image_size=32", "data.color_jitter=true",
                         "data.lighting=true", "data.trivial_augment=true"]}[source]

    def images(workers, epoch, seed=0, batch_size=4):
        data = load(f"data={source}", *root, f"data.batch_size={batch_size}",
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


def test_moves_cover_all_shifts(load):
    data = load("data=digits")
    moves = data.train_set.moves(0)
    a_pixel_each_way = {(row, column, 0) for row in range(3) for column in range(3)}
    assert {tuple(move) for move in moves.tolist()} == a_pixel_each_way, "never mirrored"


def test_normalisation(load):
    data = load("data=digits", "data.mean=[0.5,0.25,0]", "data.std=[0.5,1,0.2]", train=False)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    images, targets = data.on_after_batch_transfer((white, torch.tensor([3])))
    assert images[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.75, 5])
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


def test_filling_images_do_not_count(load):
    data = load("data=digits", train=False)
    _, targets = data.test_set.__getitems__([(0, 5, True), (0, 6, False)])
    assert targets.tolist() == [int(data.test_set.targets[5]), -1]


def test_held_out_images(load, cifar):
    data = load(f"data.root={cifar}", "data.val_size=12", "data.batch_size=28")
    assert not set(data.val_indices.tolist()) & set(data.train_indices.tolist())
    assert len(data.val_indices) + len(data.train_indices) == 40
    images, _ = next(iter(data.val_dataloader()[1]))
    assert torch.equal(images, data.train_set.images[data.val_indices]), "not augmented"


def test_process_shares_divide_the_batch(load):
    data = load("data=digits", "data.batch_size=64")
    data.trainer = SimpleNamespace(global_rank=1, world_size=4)
    assert data.train_dataloader().batch_size == 16
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    with pytest.raises(ValueError, match=r"data\.batch_size=64.*3 processes"):
        data.train_dataloader()


def test_image_size_resizes(load, cifar):
    data = load(f"data.root={cifar}", "data.batch_size=8", "data.image_size=16")
    assert data.image_size == 16
    assert load("data=digits", "data.image_size=32").train_set.images.shape[1:] == (3, 32, 32)


def test_images_are_moved_by_less_than_they_are_wide(make_settings):
    conf = make_settings("model=resnet8", "data=digits", "data.crop_padding=8").data
    with pytest.raises(ValueError, match="data.crop_padding=8 must be less than the side of the images, 8"):
        ImageData(conf, 0).load(train=True)


def test_tree_of_files(load, files):
    data = load("data=imagenet", f"data.root={files}", "data.image_size=32",
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


def test_some_images_of_every_class(load, files):
    data = load("data=imagenet", f"data.root={files}", "data.image_size=32",
                "data.batch_size=2", "data.max_images=6", "data.num_workers=0")
    assert torch.bincount(torch.tensor(data.test_set.tree.targets)[data.test_indices]).tolist() == [2, 2, 2]
    assert torch.bincount(torch.tensor(data.train_set.tree.targets)[data.train_indices]).tolist() == [2, 2, 2]
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 6
    for few in (("data.max_images=32",), ("data.val_size=5000",)):
        message = rf"data.batch_size=64 is larger than the \d+ training images of data=digits with {few[0]}"
        with pytest.raises(ValueError, match=message):
            load("data=digits", "data.batch_size=64", *few)
    everything = load("data=digits", "data.max_images=5000")
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
