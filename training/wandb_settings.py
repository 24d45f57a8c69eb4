"""W&B's settings file in the current folder, which may be a stranger's."""

import configparser
import os
from pathlib import Path

from settings.cli import SMALL

HARMLESS = {"project", "mode", "disabled", "git_remote"}  # what such a file may say


def refuse_settings_of_folder() -> None:
    """Refuse a file that says more: where keys and runs go, by a server, an account, a proxy, a header ...

    Raises:
        ValueError: with what to do.
    """
    for name in ("wandb", ".wandb"):
        path = Path(os.environ.get("WANDB_DIR", "."), name, "settings")
        if not path.exists() or path.is_file() and "WANDB_BASE_URL" in os.environ:
            continue
        if not path.is_file() or path.stat().st_size > SMALL:
            raise ValueError(f"logger=wandb: {path}, which W&B would read, is no small file: start this in "
                             "another folder")
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(errors="replace"))
            said = {key for section in parser.values() for key in section}
        except configparser.Error:
            said = {"what cannot be read"}
        if more := said - HARMLESS:
            raise ValueError(f"logger=wandb: {path} says to whom, or how, W&B sends your key and your runs "
                             f"({min(more)!r}): set WANDB_BASE_URL if you know that file, or start this in "
                             "another folder")
