"""Evaluate a checkpoint on the test set, in float32.

    python eval.py ckpt=outputs/.../checkpoints/last.ckpt
"""

import math

if __name__ == "__main__":
    from settings.early import check_command_line
    check_command_line("eval")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evaluation.evaluate import load_run, pick_device, predict, scores, sentence
from settings.cli import plain_errors
from settings.command import Command, resolve


def evaluate(command: Command) -> dict[str, float]:
    """Evaluate `command.ckpt`.

    Returns:
        `top1`, `top5` (fractions) and `loss`.

    Raises:
        ValueError: if the checkpoint or the data is wrong.
    """
    net, data, _ = load_run(command)
    if data.classes is None:
        raise ValueError("data=none has no labels to evaluate on; choose a data set, or run convert.py")
    result = scores(*predict(net, data, pick_device(command.trainer.accelerator), "test"))
    if not math.isfinite(result["loss"]):
        raise ValueError(f"the test loss is {result['loss']}: the weights, or data.mean and data.std, give "
                         "logits that are no finite numbers")
    return result


@hydra.main(config_path="configs", config_name="eval", version_base="1.3")
def main(cfg: DictConfig) -> float:
    with plain_errors():
        command = resolve(cfg, HydraConfig.get().overrides.task)
        result = evaluate(command)
        print(sentence(result, command.ckpt))
        return result["top1"]


if __name__ == "__main__":
    main()
