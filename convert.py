"""Fold every block of a trained network into one plain convolution, and prove that nothing changed.

Writes files that other libraries load. `python convert.py --help` says what to type (its text is in
configs/convert.yaml).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, onnx and W&B ...", file=sys.stderr, flush=True)  # which takes seconds
    from settings.early import check_command_line
    check_command_line("convert")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conversion.steps import (
    compare_files,
    compare_graphs,
    fold,
    names_of,
    refuse_changes,
    refuse_settings,
    write_files,
    write_report,
)
from evaluation.evaluate import load_run, pick_device
from export.files import save_hub
from export.formats import require
from export.place import refuse_anothers, require_place, staged
from reports.conversion import print_tables
from runs.folder import RunFolder
from settings.cli import output_folder, plain_errors, printable
from settings.command import Command, resolve
from training.loggers import log_conversion


def convert(command: Command, out: Path) -> dict:
    """Evaluate branch by branch, convert in float64, write each file, load it again, and evaluate it so.

    Without labels (`data=none`) all of it runs on noise images, and no accuracy is measured.

    Args:
        command: `ckpt`, and with `source` the model and blocks of that published file; else the
            checkpoint's own.
        out: gets report.md, report.json, report.png, model.safetensors, and what `export` and `hub` ask for.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: if the checkpoint or the data is wrong, a package is missing, or a file does not compute
            what the network did within `tolerance`; report-failed.json then has the figures, and the files of
            an earlier conversion stay.
    """
    require(command.export)
    require_place(out, names_of(command))
    net, data, about = load_run(command, train=True)
    refuse_settings(command, net, data, about)
    output_folder(out)
    device = pick_device(command.trainer.accelerator)
    converted, report, logits = fold(net, data, about, device, command)
    with staged(out) as part:
        read = write_files(command, converted, part)
        compare_files(read, logits, data, device, part, report)
        compare_graphs(converted, read, part, report)
        refuse_changes(report, out)
        if command.hub:
            save_hub(converted.stock, about, part / "hub")
        write_report(report, part)
    return report


@hydra.main(config_path="configs", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with plain_errors():
        command = resolve(cfg, HydraConfig.get().overrides.task)
        ckpt = Path(command.ckpt or "")
        run = RunFolder.of_checkpoint(ckpt)
        folder = run or RunFolder(Path("outputs", ckpt.stem.lstrip(".")))
        of_last = run is None or ckpt.name == run.last.name
        out = Path(command.out or folder.path / ("convert" if of_last else f"convert-{ckpt.name}"))
        folder.refuse_links()
        if command.out is None and run is None:
            if folder.is_ours():
                raise ValueError(f"{folder.path} is the folder of a run that did not write {ckpt}: say with "
                                 "out=DIR where to write")
            refuse_anothers(out, ckpt)
        report = convert(command, out)
        if command.logger.name == "wandb":
            log_conversion(report, command, out, folder)
        print_tables(report)
        files = ", ".join(report["files"])
        written = f"written to {out}: look at report.md and report.png; the network is in {files}"
        print("", printable(written), sep="\n")


if __name__ == "__main__":
    main()
