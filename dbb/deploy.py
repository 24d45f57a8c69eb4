"""What a trained network becomes: plain convolutions, with the norms around them kept, folded or restored."""

import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from dbb.block import ReparamConv2d, copied
from dbb.flow import Inputs, call
from dbb.surgery import NothingSwappedError, Report, replace_convs
from dbb.transforms import fill


def reparameterize(model: nn.Module) -> nn.Module:
    """A copy with a plain, trainable `nn.Conv2d` (with bias) in place of every block.

    Module names, dtype, device and memory format are kept. Harmless the second time.

    Raises:
        ValueError: if a block is in training mode, or the network cannot be copied.
    """
    model, fused = copied(model), {}
    for name, module in reversed([*model.named_modules(remove_duplicate=False)]):  # the inner ones first
        if isinstance(module, ReparamConv2d):
            if module not in fused:
                fused[module] = module.fuse()
            if not name:
                return fused[module]
            model.set_submodule(name, fused[module])
    return model


def fold_norms(model: nn.Module, example_input: Inputs) -> nn.Module:
    """The network to deploy: `reparameterize`, and every norm fed by a convolution of any size folded.

    Takes a model in eval, which stays as it is; `example_input` and errors are as in `replace_convs`.
    """
    merged = reparameterize(model)
    try:  # a convolution and its norm are a block of one branch
        blocks, _ = replace_convs(merged, ["kxk"], include=["*"], example_input=example_input,
                                  kernel_sizes=range(1, 2**31), init="single")
    except NothingSwappedError:
        return merged
    return reparameterize(blocks)


@torch.no_grad()
def restore_norms(model: nn.Module, report: Report, plain: nn.Module, batches: Iterable[Inputs]) -> nn.Module:
    """Fill the plain network that the blocks were put into, under its own keys, with what `model` computes.

    A merged convolution `y + b` goes into the convolution and the norm behind it: its mean m and variance v
    over `batches` become the norm's statistics, sqrt(v + eps) its weight and m its bias. In eval that is
    `y + b` again; in training too, as far as a batch has the same statistics: fine-tuning starts from there.
    A convolution that no norm follows gets `b` as its bias, and thus has one if it had none.

    Args:
        model: in eval.
        report: what `replace_convs` said when the blocks were put in.
        plain: the network from before, with any weights; left as it is.
        batches: images `[N, C, H, W]` as in fine-tuning; or several inputs, in order or by name.

    Returns:
        A copy of `plain`, filled, in eval.

    Raises:
        ValueError: if a block is in training mode, `plain` is another network, or there are no images.
    """
    if isinstance(batches, Tensor):
        raise ValueError("batches: give a list of batches, [images] for one")
    merged, plain = reparameterize(model), copy.deepcopy(plain)
    plain.eval()
    rows = [row for row in report if row.block is not None and row.norm]
    moments = _output_moments(merged, [row.module for row in rows], batches)
    try:
        handled = set()
        for name in biases(report, plain):
            conv = plain.get_submodule(name)
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))  # filled below
        for row, (mean, variance) in zip(rows, moments, strict=True):
            source, conv = merged.get_submodule(row.module), plain.get_submodule(row.module)
            rest, norm = merged.get_submodule(row.norm), plain.get_submodule(row.norm)
            shift = mean if conv.bias is not None else mean - source.bias.cpu()
            fill(norm.running_mean, shift, f"{row.norm}: the mean")
            fill(norm.running_var, variance, f"{row.norm}: the variance")
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(mean)
            for theirs, ours in zip(norm.children(), rest.children(), strict=True):
                theirs.load_state_dict(ours.state_dict())  # what a norm does besides
            handled |= {id(tensor) for tensor in norm.state_dict(keep_vars=True).values()}
        ours = merged.state_dict()
        plain.load_state_dict({key: tensor if id(tensor) in handled else ours[key]
                               for key, tensor in plain.state_dict(keep_vars=True).items()})
    except (AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(f"plain is not the network that the blocks were put into: {error}") from error
    return plain


def biases(report: Report, plain: nn.Module) -> list[str]:
    """The convolutions of `plain` that a block without a norm behind it gives a bias, by module name."""
    return [row.module for row in report if row.block is not None and not row.norm
            and plain.get_submodule(row.module).bias is None]


def _output_moments(model: nn.Module, names: list[str],
                    batches: Iterable[Inputs]) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance `[C]` of some convolutions' outputs, in float64."""
    # Of ones, values and squares.
    sums = [torch.zeros(3, 1, dtype=torch.float64, device="cpu") for _ in names]

    def record(index, module, args, output):
        y = output.double().cpu().transpose(0, 1).flatten(1)
        sums[index] = sums[index] + torch.stack([torch.ones_like(y).sum(1), y.sum(1), y.square().sum(1)])

    handles = [model.get_submodule(name).register_forward_hook(partial(record, index))
               for index, name in enumerate(names)]
    for batch in batches:
        call(model, batch)
    for handle in handles:
        handle.remove()
    if any(count.min() < 2 for count, *_ in sums):
        raise ValueError("batches: a norm's statistics need two values a channel at least; give images to "
                         "fill the norms from")
    return [(total / n, ((square - total.square() / n) / (n - 1)).clamp_min(0)) for n, total, square in sums]
