"""Files of strangers that would fill a memory, or that no reader comes to the end of."""

import os
import pickle
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from export.place import require_place
from images.data import ImageData
from images.reading import read_pixels
from images.sources import Tree
from models.plain import damage
from models.reading import read_weights
from reports.runs import read_epochs
from runs.folder import RunFolder


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
    with pytest.raises(ValueError, match="lines have fewer columns than its first"):
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
    with pytest.raises(ValueError, match="unreadable image: .*a.png .it is a pipe"):
        read_pixels(str(tmp_path / "a.png"))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "report.json")
        with pytest.raises(ValueError, match="what stands there is of no earlier conversion"):
            require_place(tmp_path, ["model.onnx"])
        (tmp_path / "report.json").unlink()


def test_a_checkpoint_does_not_choose_the_test_images_in_silence(make_settings, capsys):
    data = ImageData(make_settings("model=resnet8", "data=digits", "data.max_images=3").data, 0)
    data.load(train=False)
    assert "data.max_images=3: 3 of 360 test images are taken" in capsys.readouterr().out
