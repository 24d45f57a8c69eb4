"""What torch.compile makes of one block: `python benchmarks/kernels.py [--device cuda]`.

Counts, by Inductor's own metrics, the fused kernels that it generates for a training step (forward and
backward), and the calls of library functions beside them (convolutions, matrix products).
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_time import layer

LIBRARY = re.compile(r"extern_kernels\.\w+\(|torch\.ops\.(?:aten|mkldnn)[\w.]*\(|aoti_torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print("| 64 channels, 16x16 | generated kernels | library calls |\n|---|---|---|")
    for title, groups in (("dense 3x3", 1), ("depthwise 3x3", 64)):
        for variant, net in layer(64, 64, groups, 1).items():
            torch._dynamo.reset()
            metrics.reset()
            compiled, x = torch.compile(net.train().to(device)), torch.randn(32, 64, 16, 16, device=device)
            x.requires_grad_()
            _, sources = run_and_get_code(lambda run, x: run(x).square().sum().backward(), compiled, x)
            calls = sum(len(LIBRARY.findall(source)) for source in sources)
            print(f"| {title}, {variant} | {metrics.generated_kernel_count} | {calls} |", flush=True)


if __name__ == "__main__":
    main()
