"""The state of an optimiser goes on as it was, if the optimiser could have made it."""

import math
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import nn

from training.module import make_optimizer
from training.state import try_state

pytestmark = pytest.mark.slow

HERE = [name for name in timm.optim.list_optimizers() if not name.startswith(("bnb", "fused"))  # for GPUs
        and not timm.optim.get_optimizer_info(name).second_order]


@pytest.fixture
def trained(make_settings):
    """Settings, and a model and a checkpoint after a few steps of an optimiser."""
    def train(name, *overrides):
        settings = make_settings("model=resnet8", "data=digits", f"optim.name={name}", *overrides)
        net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Flatten(), nn.Linear(20, 18))
        optimizer = make_optimizer(settings, net)
        for _ in range(3):
            net(torch.randn(4, 3, 3, 3)).square().mean().backward()
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        checkpoint = {"optimizer_states": [optimizer.state_dict()], "global_step": 3,
                      "dbb": {"settings": settings.stored()}}
        return settings, SimpleNamespace(net=net), checkpoint, torch.device("cpu")
    return train


def test_every_optimiser_goes_on(trained, capsys):
    for name in HERE:
        try_state(*trained(name))
    assert capsys.readouterr().out == ""


def test_momentum_may_change(trained, make_settings):
    for before, after in ((0.9, 0.0), (0.0, 0.9)):
        _, *rest = trained("momentum", f"optim.momentum={before}")
        changed = make_settings("model=resnet8", "data=digits", "optim.name=momentum",
                                f"optim.momentum={after}")
        try_state(changed, *rest)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor", "adafactorbv", "kron", "adamuon", "laprop"])
def test_tensors_of_other_shapes(trained, name):
    """They may go together by broadcasting, and fill any memory: adafactor's rows and columns do."""
    settings, model, checkpoint, device = trained(name)
    for index, buffers in checkpoint["optimizer_states"][0]["state"].items():
        for key, value in list(buffers.items()):
            larger = torch.ones(2, *getattr(value, "shape", ()))
            buffers[key] = [larger, *value[1:]] if isinstance(value, list) else larger
            with pytest.raises(ValueError, match=rf"state\.{index}\.{key}.* is a tensor \[2"):
                try_state(settings, model, checkpoint, device)
            buffers[key] = value


@pytest.mark.parametrize(("name", "key", "value"), [
    ("adamw", "exp_avg", torch.ones(20, 3, 3, 3, dtype=torch.complex64)),
    ("sgd", "momentum_buffer", torch.ones(20, 3, 3, 3, dtype=torch.int64)), ("sgd", "momentum_buffer", None),
    ("adamw", "step", torch.tensor(250, dtype=torch.uint8)), ("adamw", "step", torch.tensor(-1.0)),
    ("adamw", "step", torch.tensor(math.nan)), ("adamw", "step", 2**50), ("madgrad", "step", -7),
    ("madgrad", "step", 2**50), ("madgrad", "step", "x"), ("muon", "use_muon", False),
    ("adamw", "more", torch.ones(1)), ("adamw", "exp_avg", ...)])
def test_states_that_no_step_leaves(trained, name, key, value):
    settings, model, checkpoint, device = trained(name)
    buffers = checkpoint["optimizer_states"][0]["state"][0]
    if value is ...:
        del buffers[key]
    else:
        buffers[key] = value
    with pytest.raises(ValueError, match=r"its optimiser has another state .ValueError: state\.0"):
        try_state(settings, model, checkpoint, device)


@pytest.mark.parametrize("step", [-5, 10**400, "x", None], ids=["below 0", "huge", "text", "none"])
@pytest.mark.parametrize("name", ["adan", "lamb"])
def test_steps_of_all_parameters_together(trained, name, step):
    settings, model, checkpoint, device = trained(name)
    checkpoint["optimizer_states"][0]["param_groups"][0]["step"] = step
    with pytest.raises(ValueError, match=r"its optimiser has another state .*param_groups\.step is"):
        try_state(settings, model, checkpoint, device)


def test_states_of_other_parameters(trained):
    """By the list of a group, torch would give them to others, or to none."""
    settings, model, checkpoint, device = trained("sgd")
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        honest = group["params"]
        for group["params"] in (honest[::-1], [10**6 + index for index in honest], honest[1:], None):
            with pytest.raises(ValueError, match=r"another state .*param_groups\.params is"):
                try_state(settings, model, checkpoint, device)
        group["params"] = honest


def test_what_is_missing_is_said(trained, capsys):
    settings, model, checkpoint, device = trained("sgd")
    del checkpoint["optimizer_states"][0]["state"][0]
    try_state(settings, model, checkpoint, device)
    assert "has no state of the optimiser for 1 of its parameters" in capsys.readouterr().out
