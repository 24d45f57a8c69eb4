"""Which norm is fed by which convolution: pairs are found by where tensors flow, not by names."""

import gc
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dbb.norms import PassedNorm
from dbb.private import TorchDispatchMode, tree_leaves
from dbb.subclass import Stays, with_values

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network on one tensor, or on several inputs, in order or by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


class Flow(TorchDispatchMode):
    """Follow the outputs of convolutions through one forward pass in eval.

    Works on tensors, below autograd, so that `torch.cat`, `+` and `F.relu` are seen as well as modules.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.norms = defaultdict(list)  # convolution -> the norm fed by each of its calls
        self.feeders = defaultdict(list)  # norm -> what feeds each of its calls: a convolution or None
        self.others = defaultdict(set)  # convolution -> the operators, besides its norm, that take its output
        self.odd = held_besides(model)  # convolutions and norms that are used besides as a block is not
        self.taken = set()  # ids of outputs that a norm has taken
        self.made = {}  # id of an output -> (its convolution, the output, kept so that the id stays its own)
        self.inputs = {}  # convolution -> one input, without values
        self.inside = None  # the tensor that a norm is working on
        self.working = None  # the convolution or norm whose forward runs
        self.owner, self.handles = {}, []  # id of a parameter or buffer -> its module; those of the hooks
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                self.handles.append(module.register_forward_hook(self._passed))
        for module in [m for m in model.modules() if isinstance(m, (nn.Conv2d, *NORMS))]:
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                self.owner[id(tensor)] = module
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def _enter(self, module, args, kwargs):
        self.working = module
        if not args and kwargs.keys() == {"input"}:  # torch's name of what its own layers take
            args, kwargs = (kwargs["input"],), {}
        if len(args) != 1 or kwargs:
            self.odd.add(module)
        elif isinstance(module, NORMS):
            conv, _ = self.made.get(id(args[0]), (None, None))
            self.feeders[module].append(conv)
            if id(args[0]) in self.taken:
                self.odd.add(module)
            if conv is not None:
                self.taken.add(id(args[0]))
                self.norms[conv].append(module)
                self.inside = args[0]
        else:
            self.inputs[module] = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")

    def _passed(self, module, args, output):
        """A module that returns its input in eval, as dropout does, may not do so in training."""
        if args and output is args[0] and type(module) not in (nn.Identity, nn.Sequential):
            self.note(output, type(module).__name__)

    def _leave(self, module, args, output):
        self.working = self.inside = None
        if isinstance(module, nn.Conv2d):
            self.made[id(output)] = module, output
            self.norms[module]  # a convolution that was called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, tensors, consumer: str):
        """Note that `consumer` takes those of `tensors` that a convolution made, or it or a norm holds."""
        for tensor in tree_leaves(tensors):
            if tensor is not self.inside and id(tensor) in self.made:
                self.others[self.made[id(tensor)][0]].add(consumer)
            if id(tensor) in self.owner and self.owner[id(tensor)] is not self.working:
                self.odd.add(self.owner[id(tensor)])

    def run(self, model: nn.Module, inputs: Inputs):
        """One forward pass in eval, without gradients; the model is as before but for its mode."""
        try:
            with torch.no_grad(), self, Dropouts(self.note):
                model.eval()  # a network's own may return nothing
                result = call(model, inputs)
        except Exception as error:  # whatever a network raises
            found = [f"shape {list(x.shape)}" for x in tree_leaves(inputs) if isinstance(x, Tensor)]
            shapes = ", ".join(found) or "no tensor"
            raise ValueError(f"the network cannot run on example_input of {shapes} ({type(error).__name__}: "
                             f"{error}); pass one that it takes") from error
        finally:
            for handle in self.handles:
                handle.remove()
        kept = "what the network returns or keeps"
        self.note(result, kept)
        if any(map(_held, self.made.values())):
            gc.collect()  # unless by what nothing reaches
        for made in filter(_held, self.made.values()):
            self.others[made[0]].add(kept)
        return self


class Dropouts(TorchFunctionMode):
    """Calls `note(tensor, name)` for dropout as a function, which runs no operator in eval."""

    def __init__(self, note: Callable[[Any, str], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            self.note((args, kwargs), name)
        return func(*args, **(kwargs or {}))


def held_besides(model: nn.Module) -> set[nn.Module]:
    """Modules that, or whose parameters, something besides their parents holds; it would keep the old ones.

    That is a list, an object, a method, an optimizer that the network has; or another module, of a tensor.
    """
    def references(root):
        places = Counter(chain.from_iterable(
            (*m._modules.values(), *m._parameters.values()) for m in root.modules()))
        return {part: sys.getrefcount(part) - count for part, count in places.items() if part is not None}

    [unheld] = references(nn.Sequential(nn.Identity())).values()
    if any(count > unheld for count in references(model).values()):
        gc.collect()  # of what nothing reaches
    held = {part for part, count in references(model).items() if count > unheld}
    tensors = {m: (*m._parameters.values(), *m._buffers.values()) for m in model.modules()}
    places = Counter(chain.from_iterable(tensors.values()))
    held |= {tensor for tensor, count in places.items() if count > 1}
    return {m for m, own in tensors.items() if not held.isdisjoint({m, *own} - {None})}


def _held(pair: tuple[Any, Tensor]) -> bool:
    """Whether anything besides the pair holds its tensor: a result, an attribute, a closure, a list ..."""
    unheld = None, torch.empty(0)
    return sys.getrefcount(pair[1]) > sys.getrefcount(unheld[1])


def refuse_odd(conv: nn.Conv2d, flow: Flow) -> None:
    """`Stays` if a block cannot stand for a convolution, whatever follows it."""
    if conv not in flow.norms:
        raise Stays("not reached by the example input")
    if conv in flow.odd:
        raise Stays("it is called with more than one input, or it or its weight is used elsewhere too")


def partner(conv: nn.Conv2d, flow: Flow, names: dict[nn.Module, str]) -> nn.Module:
    """The norm that alone takes a convolution's output; `Stays` if a block cannot stand for the two."""
    norms, others = set(flow.norms[conv]), ", ".join(sorted(flow.others[conv]))
    if not norms:
        raise Stays(f"no BatchNorm2d follows, but {others or 'nothing'}")
    if others:
        raise Stays(f"its output also goes to {others}")
    norm = norms.pop()
    if norms or set(flow.feeders[norm]) != {conv}:
        raise Stays(f"{names[norm]} normalises other maps too, or not all of this one's")
    if norm in flow.odd:
        raise Stays(f"{names[norm]} is called with more than one input or twice with one, or it or its "
                    "parameters are used elsewhere too")
    if norm.weight is None or norm.bias is None or norm.running_mean is None:
        raise Stays(f"{names[norm]} has no gamma, no bias or no running statistics")
    return norm


def refuse_hooks(*modules: nn.Module) -> None:
    """`Stays` if one has hooks or methods of its own."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    if any(getattr(m, kind) for m in modules for kind in hooks) \
            or any(callable(value) and hasattr(type(m), name) for m in modules
                   for name, value in vars(m).items()):
        raise Stays("it or its norm has hooks, or methods of its own, which a block would not run")


@torch.no_grad()
def after_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Module:
    """What a norm module does after normalising; `Stays` if that cannot be told.

    A subclass is taken for "normalise, then my children in order" (timm's `BatchNormAct2d`), and then asked.
    """
    if type(norm) in NORMS:
        return PassedNorm(norm)
    more = {*norm._parameters, *norm._buffers}.difference(nn.BatchNorm2d(1).state_dict())
    if more:
        raise Stays(f"its norm is a {type(norm).__name__}, which has {', '.join(sorted(more))} besides")
    asked = with_values(norm)
    asked.momentum = 0.5
    rest = PassedNorm(asked)
    probe = torch.linspace(-3, 3, 6 * norm.num_features, device="cpu").to(asked.weight).reshape(1, -1, 2, 3)
    # SyncBatchNorm cannot be asked in training mode on a CPU.
    for training in [False] if isinstance(norm, nn.SyncBatchNorm) else [False, True]:
        statistics = asked.running_mean.clone(), asked.running_var.clone()
        plain = F.batch_norm(probe, *statistics, asked.weight, asked.bias, training, 0.5, norm.eps)
        try:
            with torch.random.fork_rng(devices=[]):
                known = torch.equal(rest.train(training)(plain), asked.train(training)(probe))
            known &= all(map(torch.equal, statistics, (asked.running_mean, asked.running_var)))
        except Exception:  # whatever somebody else's norm raises
            known = False
        if not known:
            raise Stays(f"its norm is a {type(norm).__name__}, which does more than is known here")
    return PassedNorm(norm)
