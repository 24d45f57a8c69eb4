"""Small trees of images, and data of some settings."""

import pytest

from images.data import ImageData
from tests.helpers import write_tree


@pytest.fixture
def cifar(tmp_path):
    return write_tree(tmp_path / "cifar", ("train", "test"), [f"c{i}" for i in range(10)], 4, (32, 32))


@pytest.fixture
def files(tmp_path):
    return write_tree(tmp_path / "files", ("train", "val"), ["n01", "n02", "n03"], 6, (50, 40))


@pytest.fixture
def load(make_settings):
    """What makes the data of some settings."""
    def loaded(*overrides, train=True, seed=0):
        data = ImageData(make_settings(*overrides).data, seed)
        data.load(train)
        return data
    return loaded
