"""Every knob with values of every wrong kind: an error that names the knob, or a value that harms nothing."""

import contextlib
import copy
import os
import string
import typing
from dataclasses import fields, is_dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from settings.command import Command, resolve
from tests.dbb.blocks import examples
from tests.helpers import ROOT

pytestmark = pytest.mark.slow

HUGE = "1" + 30 * "0"
VALUES = {
    int: ["abc", "-1", "1.5", HUGE, "nan", "[1]", "{a: 1}", "''"],
    float: ["abc", "-1", "nan", "inf", "1e300", "[1]", "{a: 1}", "''"],
    bool: ["perhaps", "[1]", "nan", "{a: 1}"],
    str: ["nonsense", "[1]", "{a: 1}"],
    list: ["abc", "[1]", "[nan]", "[inf, 1, 1]", "[[1], 1, 1]", "[{a: 1}]", "{a: 1}", "3"],
}
# A name or a path of the user's, which is looked at later, or by Lightning; more than there is, that is all.
HARMLESS = {
    *(f"{knob}=nonsense" for knob in (
        "model.name", "model.weights", "data.root", "logger.project", "logger.entity", "logger.group",
        "logger.id", "ckpt", "out", "trainer.accelerator", "trainer.strategy", "trainer.precision")),
    *(f"{knob}={HUGE}" for knob in (
        "data.val_size", "data.max_images", "optim.lr_batch_size", "trainer.check_val_every_n_epoch",
        "trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.log_every_n_steps",
        "checkpoint.every_n_train_steps", "block.positions")),
    "trainer.gradient_clip_val=1e300", "tolerance=1e300", "trainer.devices=abc", "trainer.devices=null",
    "logger.tags=[1]", "logger.tags=[nan]", "block.include=[1]", "block.include=[nan]", "block.exclude=[1]",
    "block.exclude=[nan]", "block.kernel_sizes=[1]", "block.name=nonsense",
    *(f"{knob}=[inf, 1, 1]" for knob in ("block.include", "block.exclude", "logger.tags"))}


def knobs(conf: type, prefix: str = ""):
    """Names and types of all knobs."""
    types = typing.get_type_hints(conf)
    for part in fields(conf):
        if is_dataclass(types[part.name]):
            yield from knobs(types[part.name], f"{prefix}{part.name}.")
        else:
            yield prefix + part.name, types[part.name]


def table():
    """Words of a command line."""
    for knob, kind in knobs(Command):
        kinds = [typing.get_origin(of) or of for of in (typing.get_args(kind) or [kind])]
        if typing.get_origin(kind) is list:
            kinds = [list]
        values = [value for of in kinds for value in VALUES.get(of, [] if of is type(None) else ["abc"])]
        if type(None) not in kinds and kind is not typing.Any:
            values.append("null")
        yield from dict.fromkeys(f"{knob}={value}" for value in values)


@pytest.fixture(scope="module")
def composed():
    with initialize_config_dir(os.path.join(ROOT, "configs"), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("convert", ["data=digits", "block=dbb"]))
    return OmegaConf.merge(OmegaConf.structured(Command), cfg)


def take(composed, *words: str) -> Command:
    """As the command line does, without composing anew."""
    cfg = copy.deepcopy(composed)
    for override in OverridesParser.create().parse_overrides(words):
        try:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
        except OmegaConfBaseException as error:  # which Hydra shows with the knob's name
            raise ValueError(f"{override.key_or_group}: {error}") from error
    return resolve(cfg, words)


def test_there_are_enough_of_them():
    assert len(list(table())) >= 250


def test_wrong_values(composed):
    wrong = []
    for word in table():
        try:
            take(composed, word)
        except ValueError as error:
            knob = word.partition("=")[0]
            if knob not in str(error):
                wrong.append(f"{word}: the sentence does not name it: {error}")
        else:
            if word not in HARMLESS:
                wrong.append(f"{word} is taken")
    assert not wrong, "\n".join(wrong)


NAMES = [knob for knob, _ in knobs(Command) if knob != "ckpt"]
WORDS = st.builds("{}={}".format, st.sampled_from(NAMES), st.one_of(
    st.sampled_from(sorted({value for values in VALUES.values() for value in values})), st.integers(),
    st.floats(), st.booleans(), st.text(string.printable, max_size=8)))


@examples(150)
@given(words=st.lists(WORDS, min_size=1, max_size=5, unique_by=lambda word: word.partition("=")[0]))
def test_random_overrides_are_taken_or_refused(composed, words):
    with contextlib.suppress(ValueError, HydraException):  # the latter says what its grammar cannot read
        take(composed, *words)
