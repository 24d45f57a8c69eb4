"""Evaluate a checkpoint on the test set, in float32.

    python eval.py ckpt=outputs/.../checkpoints/last.ckpt
"""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training.cli import plain_errors
from training.evaluate import load_run, pick_device, predict, scores, sentence
from training.settings import Settings, resolve


def evaluate(settings: Settings) -> dict[str, float]:
    """Evaluate `settings.ckpt`.

    Returns:
        `top1`, `top5` (fractions) and `loss`.

    Raises:
        ValueError: if the checkpoint or the data is wrong.
    """
    net, data, _ = load_run(settings)
    if data.classes is None:
        raise ValueError("data=none has no labels to evaluate on; choose a data set, or run convert.py")
    return scores(*predict(net, data, pick_device(settings.trainer.accelerator), "test"))


@hydra.main(config_path="configs", config_name="eval", version_base="1.3")
def main(cfg: DictConfig) -> float:
    with plain_errors():
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        result = evaluate(settings)
        print(sentence(result, settings.ckpt))
        return result["top1"]


if __name__ == "__main__":
    main()
