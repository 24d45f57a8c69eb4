"""Try to lose a run's work: kills at random moments, a disk that is full at every size, another file system.

    python tools/torture.py            # half an hour; make torture; as root, to mount small disks

Each trial is a small run of digits that is hurt, and then goes on by the same command. It must end with the
weights of a run that was left alone, bit by bit. Prints a line a trial, and at the end a table.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "train.py"), "model=resnet8_dbb", "data=digits", "data.max_images=640",
           "data.batch_size=32", "trainer.max_epochs=4", "optim.ema_decay=0.9", "data.mixup=0.2",
           "logger=csv", "trainer.log_every_n_steps=5"]
IN_MID_EPOCH = ["checkpoint.every_n_train_steps=3"]
KILLS = 60
SIZES = range(64, 3200, 160)  # KiB of a disk; a checkpoint takes about 2,400


def start(folder: Path, *more: str, **kwargs) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*COMMAND, *more, f"out={folder}"], env=env, cwd=folder.parent, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **kwargs)


def finish(folder: Path, *more: str) -> None:
    process = start(folder, *more)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"] | {f"now {key}": value
                                       for key, value in checkpoint["current_model_state"].items()}


def same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = weights(folder)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def killed(folder: Path, draw: random.Random, *more: str) -> bool:
    """Start a run, and kill it at a random moment of its training; whether it was still running then."""
    process = start(folder, *more)
    while not (folder / "config.yaml").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 4))
    process.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    process.communicate()
    return not (folder / "result.json").exists()


def kills(root: Path, expected: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Runs that are killed once to five times: how many kills were survived, of how many, by kind."""
    draw, counts = random.Random(0), {"saved after an epoch": [0, 0], "saved every 3 steps": [0, 0]}
    for kind, more in zip(counts, ([], IN_MID_EPOCH), strict=True):
        trial = 0
        while counts[kind][1] < KILLS // 2:
            folder, hit = root / f"{kind[-6:].strip()}-{trial}", 0
            for _ in range(draw.randrange(1, 6)):
                hit += killed(folder, draw, *more)
            finish(folder, *more)
            good = same(folder, expected)
            counts[kind][0] += hit * good
            counts[kind][1] += hit
            trial += 1
            print(f"{kind}: killed {hit} times, {'the same' if good else 'OTHER WEIGHTS'}", flush=True)
    return {kind: tuple(of) for kind, of in counts.items()}


def full_disks(root: Path, expected: dict[str, torch.Tensor]) -> tuple[int, int, int] | None:
    """Runs on disks of every size, and again with room: how many failed first, and went on, of how many."""
    disk, failed, good = root / "disk", 0, 0
    disk.mkdir()
    for size in SIZES:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False).returncode:
            return None  # not allowed here
        process = start(disk / "run", *IN_MID_EPOCH)
        _, errors = process.communicate()
        failed += process.returncode != 0
        assert "Traceback" not in errors, errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(disk / "run", *IN_MID_EPOCH)
        right = same(disk / "run", expected)
        good += right
        ended = "the same" if right else "OTHER WEIGHTS"
        print(f"a disk of {size} KiB: status {process.returncode}, then {ended}", flush=True)
        subprocess.run(["umount", str(disk)], check=True)
    return failed, good, len(SIZES)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finish(root / "whole")
        expected = weights(root / "whole")
        disks = full_disks(root, expected)
        counts = kills(root, expected)
    for kind, (good, count) in counts.items():
        print(f"killed, {kind}: {good} of {count} kills cost nothing")
    if disks is None:
        print("full disks: not run, as this user may not mount one")
    else:
        print(f"full disks: {disks[1]} of {disks[2]} runs ended the same, {disks[0]} of them after a failure")


if __name__ == "__main__":
    main()
