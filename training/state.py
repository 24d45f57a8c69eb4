"""The state of an optimiser in a checkpoint, which must be one that the optimiser makes itself."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.say import say, shown
from settings.command import Command
from training.module import Classifier, make_optimizer, stepped_once

MOST = 2**40  # that a number of a state may be, such as a count of steps


def try_state(command: Command, model: Classifier, checkpoint: dict[str, Any], device: torch.device) -> None:
    """Give an optimiser the state in a checkpoint; a line says so if it lacks that of some parameters.

    Some optimisers work on the `device` of the training alone.

    Raises:
        ValueError: if the optimiser does not take it, or makes another itself.
    """
    try:
        [state] = checkpoint["optimizer_states"]
        known = _made(command, model, checkpoint, device)
        for index, buffers in state["state"].items():
            _compare(buffers, known["state"][index], f"state.{index}")
        for group, of_known in zip(state["param_groups"], known["param_groups"], strict=True):
            # By the first, torch finds each parameter's state; the others are the settings'.
            kept = [{key: options[key] for key in ("params", "step") if key in options}
                    for options in (group, of_known)]
            _compare(*kept, "param_groups")
            if group["params"] != of_known["params"]:
                raise ValueError("param_groups.params is in another order")
        make_optimizer(command, model.net).load_state_dict(state)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError,
            ValueError) as error:
        raise ValueError(f"ckpt={command.ckpt} cannot be gone on from: its optimiser has another state "
                         f"({type(error).__name__}: {shown(str(error))}); optim.name and "
                         "optim.decay_norm_and_bias must be as they were") from error
    missing = len(known["state"].keys() - state["state"].keys())
    if missing and checkpoint["global_step"]:
        say(f"ckpt={command.ckpt} has no state of the optimiser for {missing} of its parameters: it begins "
            "anew with those")


def _made(command: Command, model: Classifier, checkpoint: dict[str, Any],
          device: torch.device) -> dict[str, Any]:
    """The state after a step, with the checkpoint's momentum: without one there are no buffers for it."""
    momentum = checkpoint["dbb"]["settings"]["optim"].get("momentum", command.optim.momentum)
    stored = replace(command, optim=replace(command.optim, momentum=momentum))
    return stepped_once(stored, copy.deepcopy(model.net).to(device)).state_dict()


def _compare(found: Any, known: Any, place: str) -> None:
    """Raise a ValueError if a part of a state, at some place of it, is of another form than a known one.

    Tensors of other shapes may go together by broadcasting, and fill any memory.
    """
    if isinstance(known, dict):
        same = isinstance(found, dict) and found.keys() == known.keys()
    elif isinstance(known, list):
        same = isinstance(found, list) and len(found) == len(known)
    elif isinstance(known, Tensor):
        same = (isinstance(found, Tensor) and found.shape == known.shape
                and found.is_floating_point() == known.is_floating_point())
    else:
        same = type(found) is type(known) and (type(known) in (int, float) or found == known)
    if same and (place.endswith(".step") or type(known) in (int, float)):
        same = 0 <= found < MOST
    if not same:
        raise ValueError(f"{place} is {_said(found)}, not like {_said(known)}")
    parts = known if isinstance(known, dict) else range(len(known)) if isinstance(known, list) else ()
    for part in parts:
        _compare(found[part], known[part], f"{place}.{part}")


def _said(part: Any) -> str:
    if isinstance(part, Tensor) and part.ndim:
        return f"a tensor {list(part.shape)} of {part.dtype}"
    return repr(part)[:100]
