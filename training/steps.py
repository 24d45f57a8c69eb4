"""The steps of train.py: the images, the network, the Trainer, the beginning and the end."""

import math
import os
import traceback

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from dbb import branchwise, compare_logits, reparameterize
from evaluation.cost import activations_of_a_batch
from evaluation.evaluate import pick_device, predict, scores, sentence
from evaluation.networks import load_network, refuse_another, restore
from export.files import sha256
from images.data import ImageData
from models.build import parameter_count
from models.checkpoint import load_checkpoint, place_of
from runs.folder import RunFolder
from runs.safety import WholeCheckpointIO, previous
from settings.cli import of_the_machine, printable, typed
from settings.command import Command
from training.callbacks import make_callbacks, shows_progress_bar
from training.cost import expected_cost
from training.divergence import DivergedError
from training.loggers import log_convolutions, log_predictions
from training.module import Classifier, rough_start, try_optimizer
from training.sgs import scaled_layers
from training.start import Start, other_images
from training.state import try_state
from training.sweep import in_a_sweep

OF_A_STATE = ("/optim/", "/pytorch_lightning/loops/")  # where one of another form fails in the first step
FORKS = ("spawn", "fork", "notebook")  # in the names of strategies that train in processes of multiprocessing


def load_data(command: Command, start: Start) -> ImageData:
    """The images, loaded.

    Raises:
        ValueError: if there are none, or they are not of the checkpoint's classes.
    """
    data = ImageData(command.data, command.seed, start.epochs, start.batches)
    print(f"loading the images of data={command.data.name}", flush=True)
    data.load(train=True)
    if start.checkpoint is not None:
        data.check_classes(start.checkpoint["dbb"]["classes"])
    return data


def refuse_what_does_not_fit(command: Command, data: ImageData) -> None:
    """Refuse, before it takes memory, what this machine's memory cannot hold.

    Raises:
        ValueError: with the knob, and both sizes in GiB.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width = 2 if command.trainer.precision in ("bf16-true", "16-true") else 4  # bytes
    network = 2 * width * parameter_count(command.model.name, len(data.classes))
    batch = width * 3 * data.image_size**2 * command.data.batch_size
    for what, size in ((f"model.name={command.model.name} with its gradients", network),
                       (f"data.batch_size={command.data.batch_size} of {data.image_size} pixels", batch)):
        if size > memory:
            raise ValueError(f"{what} takes {size / 2**30:.0f} GiB, and this machine has "
                             f"{memory / 2**30:.0f}")


def make_model(command: Command, data: ImageData, start: Start, device: torch.device) -> Classifier:
    """The network in its Lightning module, on the CPU; it is trained on `device`.

    Raises:
        ValueError: if it cannot be built, is not the checkpoint's, or has no gradient to scale.
    """
    refuse_what_does_not_fit(command, data)
    if start.checkpoint is not None:
        refuse_another(start.checkpoint, command, len(data.classes), data.image_size)
    model = Classifier(command, data.classes, data.image_size, [*start.changed, *other_images(data, start)])
    scaled_layers(command.block, model.net)
    if start.checkpoint is not None:  # what does not fit is said here, before Lightning would
        model.begins_at = start.step
        if "current_model_state" in start.checkpoint:  # the weights, beside their average
            restore(model.net, {"state_dict": start.checkpoint["current_model_state"]})
        restore(model.net, start.checkpoint)
        try_state(command, model, start.checkpoint, device)
        model.weights_digest = start.checkpoint["dbb"].get("weights_digest")
    elif command.model.weights is not None:
        model.weights_digest = sha256(command.model.weights)
    elif hasattr(model.net, "whiten"):
        model.net.whiten(next(data.calibration_images()))
    return model


def make_trainer(command: Command, folder: RunFolder) -> pl.Trainer:
    """Lightning's Trainer of a run; what could not train with it is refused before any data is read.

    Raises:
        ValueError: if the processes would lose what they measure or not train together, a job of a sweep
            would start processes, or the optimiser cannot take a step.
    """
    conf, rank = command.trainer, rank_zero_only.rank  # by a launcher's variables, if one started this
    options = command.stored()["trainer"]
    options |= {"sync_batchnorm": False, "enable_progress_bar": shows_progress_bar(command)}
    if any(kind in conf.strategy for kind in FORKS):
        raise ValueError(f"trainer.strategy={conf.strategy}: it trains in processes made by "
                         "multiprocessing, whose metrics and logs end with them: take trainer.strategy=ddp")
    plugins = [WholeCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # LastCheckpoint does, between two steps
    try:
        trainer = pl.Trainer(**options, default_root_dir=folder.checkpoints, logger=False,
                             callbacks=make_callbacks(command, folder), plugins=plugins,
                             enable_model_summary=False, use_distributed_sampler=False,
                             num_sanity_val_steps=0)
    except Exception as error:  # whatever Lightning and the packages that it needs raise
        names = "accelerator", "devices", "num_nodes", "strategy", "precision"
        asked = " ".join(f"trainer.{name}={options[name]}" for name in names)
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"Lightning cannot train with {asked}: {why}") from error
    if rank and trainer.world_size == 1:
        raise ValueError(f"this is process {rank + 1} of a launcher (srun, torchrun), and trainer.devices="
                         f"{conf.devices} trainer.strategy={conf.strategy} is a training in one process, the "
                         "first: start one, or have all train together by trainer=slurm or trainer=ddp")
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if conf.num_nodes > 1 and type(environment) is LightningEnvironment and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"trainer.num_nodes={conf.num_nodes}: this process would wait for those of other "
                         "machines, and nothing says where they are: start it on each by torchrun or SLURM "
                         "(docs/training.md)")
    if in_a_sweep() and starts_processes(trainer):
        raise ValueError(f"trainer.devices={conf.devices}: each of the {trainer.world_size} "
                         "processes of this job would start the whole sweep again: set trainer.devices=1, or "
                         "start every job by itself, without -m")
    try_optimizer(command, trainer.strategy.root_device)
    return trainer


def starts_processes(trainer: pl.Trainer) -> bool:
    """Whether Lightning starts this script once more for every further device."""
    strategy = trainer.strategy
    return isinstance(strategy, ParallelStrategy) and trainer.world_size > 1 \
        and not strategy.cluster_environment.creates_processes_externally


def begin(command: Command, model: Classifier, trainer: pl.Trainer, folder: RunFolder) -> dict[str, float]:
    """What the first process does before the training: clear the folder, write and print what is trained.

    Returns:
        `parameters`, and `activations_mib` of a batch.
    """
    folder.begin(command)
    for logger in trainer.loggers[1:]:  # the first writes metrics.csv beside the settings
        logger.log_hyperparams(command.stored())
    net, size, device = model.net, model.image_size, trainer.strategy.root_device
    activations = activations_of_a_batch(net, command.data.batch_size, size) / 2**20
    parameters = sum(p.numel() for p in net.parameters())
    reduced = f", images of {size} pixels reduced {net.total_stride} times" if net.total_stride else ""
    print(f"{command.model.name} with block={command.block.name}, on {device}: "
          f"{parameters:,} parameters, {activations:.0f} MiB for the activations of a batch{reduced}")
    said = [expected_cost(command, size, device), net.report, scaled_layers(command.block, net),
            rough_start(command)]
    print(*filter(None, said), f"run folder: {printable(str(folder.path))}", sep="\n")
    log_convolutions(trainer.loggers[-1], net.report, folder)
    return {"parameters": parameters, "activations_mib": activations}


def fit(trainer: pl.Trainer, model: Classifier, data: ImageData, command: Command, start: Start) -> None:
    """Train.

    Raises:
        ValueError: if Lightning cannot take up the state in a checkpoint.
    """
    if command.trainer.precision in ("64", "64-true"):
        model.net.double()  # Lightning does so after it has read a checkpoint, whose weights it would round
    try:
        trainer.fit(model, data, ckpt_path=command.ckpt, weights_only=True)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        restoring = any(place.endswith("checkpoint_connector.py") for place in places)
        stepping = trainer.global_step <= start.step + 1 and any(part in places[-1] for part in OF_A_STATE)
        if start.checkpoint is None or not (restoring or stepping) or of_the_machine(error) is not None:
            raise
        raise ValueError(f"ckpt={command.ckpt} cannot be gone on from: the state of its training is of "
                         f"another form ({type(error).__name__}: {error})") from error


def stopped_by_time(command: Command, folder: RunFolder) -> bool:
    """Whether `trainer.max_time` ended the training before its last epoch; a line then says how to go on."""
    epochs, batches = place_of(load_checkpoint(folder.last))
    if epochs < command.trainer.max_epochs:
        print(f"stopped by trainer.max_time={command.trainer.max_time} after {epochs} of "
              f"{command.trainer.max_epochs} epochs and {batches} batches: go on by python train.py "
              f"{typed('ckpt', folder.last)} with a longer trainer.max_time, or null")
    return epochs < command.trainer.max_epochs


def final_scores(command: Command, data: ImageData, trainer: pl.Trainer, folder: RunFolder,
                 cost: dict[str, float]) -> dict[str, float]:
    """Evaluate the checkpoint kept, branch by branch and converted; print, log and write result.json.

    Returns:
        What result.json holds.

    Raises:
        DivergedError: if the test loss is not finite.
    """
    net = load_network(load_checkpoint(folder.last), command)
    device = pick_device(command.trainer.accelerator)
    with branchwise(net):
        logits, targets = predict(net, data, device, "test")
        result = scores(logits, targets)
        if not math.isfinite(result["loss"]):
            raise DivergedError(f"the test loss is {result['loss']}, though the weights are finite: the last "
                                "steps were too large. Go on from an earlier checkpoint, such as "
                                f"{previous(folder.last)}, with a lower optim.lr")
        if command.data.val_size:
            of_val = scores(*predict(net, data, device, "val", data.held_out_dataloader()))
            result["val_top1"] = of_val["top1"]
    converted, _ = predict(reparameterize(net), data, device, "converted")
    result["converted_top1"] = scores(converted, targets)["top1"]
    result["predictions_changed"] = compare_logits([(logits, converted)]).predictions_changed
    result |= cost
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{name}": value for name, value in result.items()}, trainer.global_step)
        logger.save()
    model = trainer.lightning_module
    more = data.digests | {"weights_digest": model.weights_digest, "changed": model.changed,
                           "processes": trainer.world_size}
    result |= {key: value for key, value in more.items() if value}
    folder.finish(result)
    log_predictions(trainer.loggers[-1], data, logits, targets)
    print(sentence(result, folder.last),
          f"converted: top1 {result['converted_top1']:.4f}, {result['predictions_changed']} of "
          f"{len(targets)} predictions changed (python convert.py {typed('ckpt', folder.last)} writes the "
          "files)", sep="\n")
    return result
