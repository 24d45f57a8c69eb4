"""Pickles of strangers, alone and in zips: what they ask for is told before PyTorch reads them."""

import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch

from models import limits
from models.checkpoint import load_checkpoint
from models.plain import damage
from models.reading import read_weights


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)


class Blinded:
    """An OrderedDict whose own `values` and `get` are others."""

    def __reduce__(self):
        items = iter({"a": ["x" * 1000] * 10**4}.items())
        return OrderedDict, (), {"values": OrderedDict, "get": "x"}, None, items


MEMORY = {  # pickles that PyTorch's reader of plain values takes, and that fill a memory
    "bytearray": b"c__builtin__\nbytearray\nq\x00\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R",
    "storage": b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R",
    "sizes": b"](" + b"ctorch\nSize\nK\x01\x85\x85R" * 2000 + b"e", "call": b"ctorch\nfloat32\n)R",
    "codecs": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R",
    "dict": b"ccollections\nOrderedDict\nq\x00](K\x01K\x01\x86e\x85R",
    "states": b"](" + b"ccollections\nOrderedDict\n)R}b" * 2000 + b"e",
    "long calls": b"(" + b"K\x01" * 1000 + b"tq\x00ctorch\nSize\n(" + b"h\x00" * 10**5 + b"tR",
    "objects": b"ctorch\nSize\nK\x01\x85\x85\x81",
    "keys": b"}N" + b"q\x00h\x00\x86" * 60 + b"K\x01s", "set": b"c__builtin__\nset\n](K\x01e\x85R",
    "large keys": b"}(\x8a\x01\x01K\x00\x8a\x08" + (2**61).to_bytes(8, "little") + b"K\x00u",
    "counter": b"ccollections\nCounter\n}(" + b"".join(b"J" + number.to_bytes(4, "little") + b"K\x00"
                                                       for number in range(2000)) + b"u\x85R",
    "storage's key": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nN" + b"q\x00h\x00\x86" * 60
                     + b"X\x03\x00\x00\x00cpuK\x01tQ",
    "text": b"ccollections\nCounter\nX\x02\x00\x00\x00ab\x85R", "memo": b"J\xff\xff\xff\x7fr\xff\xff\xff\x00",
    "numbers": b"}(" + b"".join(b"J" + key.to_bytes(4, "little") + b"N" for key in range(30_000)) + b"u",
    "state": b"ctorch\nfloat32\n}b", "counted": b"ccollections\nCounter\n](K\x01e\x85R",
    "sides": b"ctorch._utils\n_rebuild_tensor\n(K\x00K\x00(" + b"K\x01" * 100 + b"tq\x00h\x00tR",
    "side list": b"ctorch._utils\n_rebuild_tensor\n(K\x00K\x00](" + b"K\x01" * 100 + b"eq\x00h\x00tR"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MEMORY)
def test_a_file_that_asks_for_memory(tmp_path, kind):
    """As a checkpoint, as weights in both of PyTorch's formats, and in the old one with a zip behind it."""
    pickled = b"\x80\x02" + MEMORY[kind] + b"."
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as file:
        for name, content in {"a/version": b"3\n", "a/byteorder": b"little", "a/data.pkl": pickled}.items():
            file.writestr(name, content)
    old = b"".join(pickle.dumps(part, 2) for part in (0x1950a86a20f9469cfc6c, 1001, {})) + pickled
    (tmp_path / "b.pth").write_bytes(old)
    (tmp_path / "c.pth").write_bytes(old + (tmp_path / "a.ckpt").read_bytes())
    words = "GLOBAL|with values|more than plain|keys that are neither|values of a tensor|numbers its parts"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / "a.ckpt")
    for name in ("a.ckpt", "b.pth", "c.pth"):
        assert re.search(words, damage(tmp_path / name)), name
        with pytest.raises(ValueError, match="cannot be read"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["data.pkl", "data.PKL"])
def test_pickles_by_any_name(tmp_path, name):
    """PyTorch's reader finds them in capitals too."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr(f"archive/{name}", pickle.dumps({"a": Large()}, protocol=2))
        file.writestr("archive/version", "3")
    assert "bytearray" in damage(tmp_path / "a.pth")


def test_attributes_of_a_dict(tmp_path):
    torch.save(Blinded(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="an OrderedDict with attributes"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_weights(tmp_path / "a.pth")
    assert "an OrderedDict with attributes" in str(error.value.__cause__)


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
