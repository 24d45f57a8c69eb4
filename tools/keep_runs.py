"""Make finished runs of a study fit to be committed: `python tools/keep_runs.py results/rivals/runs`.

Of each folder with a result.json, config.yaml loses where data lie that are the same everywhere, and
metrics.csv keeps a row an epoch. Checkpoints stay on this disk (.gitignore). The sweep's command goes on from
a clone of these files, and repeats no run that is there.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from settings.cli import as_sentence, plain_errors, refuse_matplotlibrc

if __name__ == "__main__":
    with plain_errors():
        refuse_matplotlibrc()  # before it is read, which importing does

from reports.runs import read_columns, read_epochs, under
from runs.folder import RunFolder
from runs.reading import read_own_config
from runs.safety import write_text
from settings.schema import same_everywhere


def keep(folder: RunFolder) -> None:
    """Rewrite the small files of a finished run; harmless the second time.

    Raises:
        ValueError: if one is damaged; nothing is written then.
    """
    folder.refuse_links()
    config = read_own_config(folder.config)
    try:
        epochs, rows = read_epochs(folder)["epoch"] - 1, read_columns(folder.metrics).apply(pd.to_numeric)
        if len(epochs):
            rows = rows[rows["epoch"].isin(epochs)].groupby("epoch", as_index=False).last()
            rows = rows.astype({"epoch": int, "step": int})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder.metrics} is damaged ({error})") from error
    if same_everywhere(config["data"].get("name"), config["data"].get("root")):
        config["data"]["root"] = None
    write_text(folder.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    text = rows.dropna(axis=1, how="all").to_csv(index=False, float_format="%.6g")
    write_text(folder.metrics, text if len(epochs) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    with plain_errors():
        found = under(parser.parse_args().folders, "result.json")
    runs = [folder for folder in map(RunFolder, (path.parent for path in found))
            if folder.is_ours() and folder.config.is_file() and folder.metrics.is_file()]
    damaged = []
    for folder in runs:
        try:
            keep(folder)
        except (ValueError, OSError) as error:
            damaged.append(as_sentence(error))
    print(f"{len(runs) - len(damaged)} finished runs; other folders, left as they are: "
          f"{len(found) - len(runs) + len(damaged)}")
    if damaged:
        sys.exit("\n".join(damaged))


if __name__ == "__main__":
    main()
