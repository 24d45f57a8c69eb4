"""Random blocks over the whole space of convolutions, against the plain reference.

`make fuzz` draws 50,000 of them, new ones each time.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from dbb import BRANCHES, ReparamConv2d, branchwise, replace_convs
from tests.dbb.blocks import NAMES, build, cases, examples, sample_of
from tests.dbb.reference import check_training, reference
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.slow


def test_every_branch_is_drawn():
    assert set(NAMES) == set(BRANCHES) - {"row"}  # the README's worked example


# More padding than the kernel has taps, which is rarely drawn with a stride and without groups.
WIDE = dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=2,
            branches=["kxk", "1x1", "1x1_avg"])


@examples(250)
@example((WIDE, (9, 8)), 0.1)
@given(cases(), st.sampled_from([0.1, None]))
def test_block_is_the_reference(case, momentum):
    block, x = build(case)
    for norm in block.norms():
        norm.momentum = momentum
    check_training(block, x, sample_of(block, x) if block.mode == "online" else None)

    x = x.detach()
    with torch.no_grad():
        expected, _ = reference(block.eval(), x)
        with branchwise(block):
            assert relative_error(block(x), expected) < 1e-12
        assert relative_error(block(x), expected) < 1e-12
        assert relative_error(block.fuse()(x), expected) < 1e-12


@examples(200)
@given(cases(largest=7), st.booleans())
def test_surgery_takes_any_convolution(case, bias):
    arguments, size = case
    branches, mode = ["kxk", *arguments.pop("branches")], arguments.pop("mode")
    torch.manual_seed(0)
    conv = nn.Conv2d(**arguments, bias=bias)
    net = randomize(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))).double().eval()
    x = torch.randn(4, conv.in_channels, *size, dtype=torch.float64)
    new, _ = replace_convs(net, partial(ReparamConv2d, branches=branches, mode=mode), example_input=x,
                           kernel_sizes=range(1, 12), init="single")
    with torch.no_grad():
        assert relative_error(new(x), net(x)) < 1e-12, "a warm start is the same function"
        assert relative_error(new[0].fuse()(x), net(x)) < 1e-12
        net.train(), new.train()
        new[0].positions = 1000  # online too
        assert relative_error(new(x), net(x)) < 1e-12, "in training too, before the first step"


@examples(40)
@given(cases(largest=5, extra=6))
def test_precisions_and_memory_formats(case):
    block, x = build(case, dtype=torch.float32)
    block.eval()
    with torch.no_grad():
        expected = block(x)
        assert relative_error(block.fuse()(x), expected) < 1e-5
        assert relative_error(copy.deepcopy(block).double()(x.double()), expected) < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            assert relative_error(copy.deepcopy(block).to(dtype)(x.to(dtype)), expected) < 5e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(block(x), expected) < 5e-2
        last = copy.deepcopy(block).to(memory_format=torch.channels_last)
        assert relative_error(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
    x = torch.cat([x] * 4) + 0.1 * torch.randn(16, *x.shape[1:])
    expected = block.train()(x)
    full = copy.deepcopy(block.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = build(case, dtype=torch.float32)
        assert relative_error(again.train()(x), expected) < 0.1
    inner = [name for name in full if "scale.running_var" in name]
    for name in inner:
        assert relative_error(again.state_dict()[name], full[name]) < 1e-5, "statistics stay in float32"
    last = build(case, dtype=torch.float32)[0].to(memory_format=torch.channels_last).train()
    assert relative_error(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-4


def test_a_grouped_kernel_of_one_column_in_channels_last():
    arguments = dict(in_channels=4, out_channels=2, kernel_size=(2, 1), padding="same", groups=2)
    block, x = build((arguments | {"branches": ["1x1_avg"]}, (2, 1)), dtype=torch.float32)
    expected = block.eval()(x)
    block.to(memory_format=torch.channels_last)
    assert relative_error(block(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


@examples(40)
@given(cases(largest=5))
def test_copies_files_averages_and_frozen_parts(case):
    block, x = build(case)
    average = AveragedModel(block.eval(), use_buffers=True).eval()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), average):
        assert torch.equal(other(x), block(x))
    frozen = copy.deepcopy(block).train()
    for module in frozen.modules():  # the usual loop
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert relative_error(frozen(x), block(x)) < 1e-12
    pairs = zip(frozen.state_dict().values(), block.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    one = copy.deepcopy(block).train()
    one.norms()[-1].eval()
    expected, stats = reference(one, x, sample_of(one, x) if one.mode == "online" else None)
    assert relative_error(one(x), expected) < 1e-12
    assert all(relative_error(one.state_dict()[key], value) < 1e-12 for key, value in stats.items())


@examples(20)
@given(cases(largest=5))
def test_update_bn_averages_over_all_batches(case):
    block, x = build(case)
    batches = [x, 2 * x + 1, x.flip(0) - 3]
    each = []
    for batch in batches:
        copied = copy.deepcopy(block).train()
        for norm in copied.norms():
            norm.momentum = 1.0  # statistics of the batch alone
        sample = sample_of(copied, batch) if copied.mode == "online" else None
        each.append(reference(copied, batch, sample)[1])
    update_bn(batches, block)
    for name in each[0]:
        mean = torch.stack([stats[name] for stats in each]).mean(0)
        assert relative_error(block.state_dict()[name], mean) < 1e-12


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arguments", [
    dict(in_channels=4, out_channels=4, kernel_size=3, padding=1),
    dict(in_channels=4, out_channels=6, kernel_size=(2, 5), padding=(1, 0), dilation=(2, 1), groups=2,
         padding_mode="circular"),
    dict(in_channels=4, out_channels=4, kernel_size=4, padding="same", groups=4)],
    ids=["dense", "grouped", "depthwise"])
def test_compile_and_export(arguments, training):
    block, x = build((arguments | {"branches": NAMES}, (9, 8)))
    expected = copy.deepcopy(block).train(training)(x)
    compiled = copy.deepcopy(block).train(training)
    assert relative_error(torch.compile(compiled, fullgraph=True, backend="aot_eager")(x), expected) < 1e-12
    exported = torch.export.export(copy.deepcopy(block).train(training), (x,))
    assert relative_error(exported.module()(x), expected) < 1e-12
