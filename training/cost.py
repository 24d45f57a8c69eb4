"""What a training step with blocks costs, where benchmarks/ has this kind of network, images and device."""

import csv
from pathlib import Path

import torch

from settings.schema import Settings

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
BLOCKS = {"exact": ["dbb"], "online": ["dbb", "dbb_online"], "linear": ["orepa"]}  # run there in each mode
GPUS = ("V100", "A100", "H100", "L4")
BATCHES = (32, 64, 256)
SMALL, LARGE = 64, 128  # pixels: up to, or from, which images are taken for those of 32, or 224


def expected_cost(settings: Settings, image_size: int, device: torch.device) -> str | None:
    """A sentence with the time of a training step over the plain network's; None if it is not known.

    Args:
        settings: of the run.
        image_size: side of its images in pixels.
        device: that it trains on.
    """
    mode, model = settings.block.mode, settings.model.name
    if settings.block.name not in BLOCKS[mode]:
        return None
    ms, source = {}, ""
    if device.type == "cpu":
        ms, source = _measured(settings, image_size), "measured on another CPU"
    elif device.type == "cuda" and image_size >= LARGE and not settings.model.compile:
        known = _known(torch.cuda.get_device_name(device))
        if known is None:
            return None
        ms, source = _measured_on_gpu(settings, known), "measured on such a GPU, with Python's part"
        if mode not in ms:
            ms, source = _modelled(settings, known), "by a model of this GPU alone, not measured"
    if mode not in ms:
        return None
    return (f"block.mode={mode}: expect a training step of {ms[mode] / ms['plain']:.1f} times the plain "
            f"{model}'s time ({source}, see benchmarks/README.md)")


def _measured(settings: Settings, image_size: int) -> dict[str, float]:
    """Milliseconds by variant, from the last of step_time.py's files that has the row."""
    kind = "224x224" if image_size >= LARGE else "compiled" if settings.model.compile else "eager"
    if SMALL < image_size < LARGE or (kind == "224x224" and settings.model.compile):
        return {}
    wanted = f"{settings.model.name}, {kind}"
    ms = {}
    for path in sorted(RESULTS.glob("step_time_*_cpu_*.csv")):
        with path.open(newline="") as file:
            ms |= {row["variant"]: float(row["ms"]) for row in csv.DictReader(file)
                   if row["row"].startswith(wanted)}
    return ms


def _measured_on_gpu(settings: Settings, known: str) -> dict[str, float]:
    """Milliseconds by variant, from gpu_time.py's file of such a GPU, of about as many images."""
    times = {}
    for path in sorted(RESULTS.glob(f"gpu_time_*{known}*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                of = row["network"], row["precision"], row["way"]
                if of == (settings.model.name, _kind(settings), "eager"):
                    times.setdefault(int(row["batch"]), {})[row["variant"]] = float(row["ms"])
    return times[min(times, key=lambda batch: abs(batch - settings.data.batch_size))] if times else {}


def _known(gpu: str) -> str | None:
    """The kind of GPU that a device's name has in it, of those that are known here."""
    return next((name for name in GPUS if name in gpu.replace("-", " ").split()), None)


def _kind(settings: Settings) -> str:
    return "bf16" if "16" in settings.trainer.precision else "TF32"


def _modelled(settings: Settings, known: str) -> dict[str, float]:
    """Milliseconds by variant, from gpu_model.py's file, of about as many images; 5 us a launch."""
    kind = f"{known} {_kind(settings)}".replace("V100 TF32", "V100 float32")
    images = min(BATCHES, key=lambda batch: abs(batch - settings.data.batch_size))
    with (RESULTS / "gpu_model.csv").open(newline="") as file:
        return {row["variant"]: float(row["modelled_ms"]) for row in csv.DictReader(file)
                if row["network and batch"] == f"{settings.model.name}, {images} images"
                and (row["gpu"], row["launch_us"]) == (kind, "5")}
