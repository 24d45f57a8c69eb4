"""Draw docs/run.png: what TensorBoard and W&B show of a run, from its TensorBoard files.

    python train.py experiment=demo logger=tensorboard out=outputs/demo_tensorboard
    python tools/run_picture.py outputs/demo_tensorboard
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from settings.cli import plain_errors, refuse_matplotlibrc

if __name__ == "__main__":
    with plain_errors():
        refuse_matplotlibrc()  # before it is read, which importing does

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs.folder import RunFolder

SHOWN = {"loss": ["train/loss_epoch", "test/loss"], "accuracy on the test images": ["test/top1"],
         "learning rate": ["lr-SGD"], "seconds a training step": ["train/seconds_per_step"]}
CURVES = 20  # of one panel, at most


def draw(run_dir: Path, path: Path) -> None:
    """The curves of SHOWN, and for the first and the last layer each branch's share and size of gammas."""
    RunFolder(run_dir).refuse_links()
    events = EventAccumulator(str(run_dir))
    names = events.Reload().Tags()["scalars"] if run_dir.is_dir() else []
    layers = [name.split("/")[1] for name in names if name.startswith("share/") and name.endswith("/kxk")]
    panels = dict(SHOWN)
    if not layers:
        raise ValueError(f"{run_dir} has no TensorBoard files of a run with blocks: train it with "
                         "logger=tensorboard")
    for layer in (layers[0], layers[-1]):
        for kind in ("share", "gamma"):
            own = [name for name in names if name.startswith(f"{kind}/{layer}/")]
            panels[f"{kind}/{layer}"] = own[:CURVES]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    places = figure.subplots(2, len(panels) // 2).flat
    for axis, (title, shown) in zip(places, panels.items(), strict=True):
        for name in shown:
            points = events.Scalars(name) if name in names else []
            label = name.removeprefix(f"{title}/").replace("$", r"\$")  # no formula
            axis.plot([point.step for point in points], [point.value for point in points], label=label)
        axis.set_title(title.replace("$", r"\$"))
        axis.set_xlabel("training step")
        if not title.startswith("gamma/"):
            axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    with plain_errors():
        draw(parser.parse_args().run, ROOT / "docs" / "run.png")


if __name__ == "__main__":
    main()
