"""What tests of runs share."""

import pytest

import train as train_script
from tests.runs.stopping import SHORT
from training import steps as train_steps


@pytest.fixture
def train_with(monkeypatch):
    """Train with one more callback."""
    def train(settings, folder, *more):
        make = train_steps.make_callbacks
        with monkeypatch.context() as patch:
            patch.setattr(train_steps, "make_callbacks", lambda *args: [*make(*args), *more])
            return train_script.train(settings, folder)
    return train


@pytest.fixture
def whole(make_settings, shared):
    """The folder of a run that nothing stopped."""
    if not (shared / "result.json").exists():
        train_script.train(make_settings(*SHORT), shared)
    return shared


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")
