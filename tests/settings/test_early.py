"""What is answered before the libraries that train are imported."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

COMMANDS = [  # words, what is said of them, what had to be imported; in one process, so that imports add up
    (["optim.lr=abc"], "error: Error merging override optim.lr=abc; Value 'abc' of type 'str'", []),
    (["optim.lr=1" + "0" * 320], "error: int too large to convert to float; full_key: optim.lr", []),
    (["optm.lr=1"], "error: Could not override 'optm.lr'.; Key 'optm' not in", []),
    (["model=resnet20_dbb", "optim.ema_decay=2"], "error: optim.ema_decay=2.0 must be", []),
    (["ckpt=nowhere.ckpt", "optim.ema_decay=2"], "", []),  # the checkpoint's other settings are not known yet
    (["-m", "optim.lr=abc"], "", []),
    (["block=dbb", "block.mode=onlin"], "error: block.mode=onlin is unknown", ["torch"]),
    (["model=timm", "model.name=resnet19x"], "error: model.name='resnet19x' is unknown", ["torch", "timm"]),
    (["model=resnet20_dbb", "model.pretrained=true"], "", ["torch", "timm"])]
PROGRAM = """
import json, sys
from settings.early import check_command_line
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv, said = ["train.py", *words], ""
    try:
        check_command_line("train")
    except SystemExit as stop:
        said = stop.code
    answers.append([said, [name for name in ("torch", "timm", "pytorch_lightning") if name in sys.modules]])
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_wrong_knob_waits_for_no_slow_import():
    commands = json.dumps([words for words, _, _ in COMMANDS])
    done = subprocess.run([sys.executable, "-c", PROGRAM, commands], cwd=ROOT, capture_output=True, text=True)
    answers = json.loads(done.stdout)
    for (words, message, imported), (said, found) in zip(COMMANDS, answers, strict=True):
        assert found == imported, words
        assert said.startswith(message) if message else said == "", words
