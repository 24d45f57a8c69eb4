"""A wrong knob is answered before the libraries that train are imported, which takes seconds."""

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from settings.cli import plain_errors, refuse_matplotlibrc
from settings.command import resolve

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def check_command_line(config_name: str) -> None:
    """Check what can be checked of a single run's command line without Lightning, the slowest to import.

    What a checkpoint has to say comes later. Ends the process with a sentence if a setting is wrong.
    """
    with plain_errors():
        refuse_matplotlibrc()
    words = sys.argv[1:]
    if any(word.startswith("-") for word in words) or "pytorch_lightning" in sys.modules:
        return  # Hydra's own flags (sweeps are checked job by job); or nothing is gained any more
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose(config_name, words)
    except OverflowError as error:
        sys.exit("error: " + "; ".join(map(str.strip, str(error).splitlines()[:2])))  # what, and which knob
    except HydraException as error:
        reasons = [str(error), str(error.__cause__ or "")]
        sys.exit("error: " + "; ".join(line for text in reasons for line in text.splitlines()[:1] if line))
    if cfg.ckpt is None:
        cfg.model.pretrained = False  # timm knows how its weights see images
        with plain_errors():
            command = resolve(cfg, words)
            from models.build import refuse_unknown  # which imports timm
            refuse_unknown(command.model.name)
