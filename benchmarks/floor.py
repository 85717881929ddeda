"""Operations and bytes of one forward pass, and the time that they need at least.

python benchmarks/floor.py [PRESET] [--batch 64] [--tflops 989] [--gbs 4800]

Nothing is computed. A kernel reads each of its inputs and writes its output once; those that a
compiler could join to their neighbours (normalisation, activation, sums) stand on their own line.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from table import table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fewstep.networks.layers import UNetBlock
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params, load_params

KINDS = {
    "convolution": "convolutions",
    "addmm": "linear maps, 1x1 of attention",
    "mm": "linear maps, 1x1 of attention",
    "bmm": "linear maps, 1x1 of attention",
    "baddbmm": "linear maps, 1x1 of attention",
    "_to_copy": "weights cast to the precision",
    "fused_attention": "attention",
}
REST = "normalisation, activation, sums, copies"


class Traffic(TorchDispatchMode):
    """FLOPs and bytes by kind of kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.quiet = False

    def note(self, name: str, flops: int, *tensors: Tensor) -> None:
        kind = self.found[KINDS.get(name, REST)]
        kind[0] += flops
        kind[1] += sum(t.numel() * t.element_size() for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        if not self.quiet and not func.is_view and "empty" not in func.__name__:
            packet = func.overloadpacket
            count = flop_registry.get(packet)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.note(packet.__name__, flops, *tensors)
        return out


def forward_traffic(params: Params, batch: int) -> dict[str, list[int]]:
    """FLOPs and bytes of a forward pass by kind; attention keeps its logits on the chip."""
    traffic, d = Traffic(), params.data

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        traffic.note("fused_attention", 4 * q.numel() * q.shape[-2], q, k, v, out)
        return out

    denoiser = build_denoiser(params).eval().to("meta")
    for block in denoiser.modules():
        if isinstance(block, UNetBlock):
            vars(block)["attention"] = attention
    x = torch.empty(batch, d.channels, d.resolution, d.resolution, device="meta")
    with traffic, torch.no_grad():
        denoiser(x, torch.empty(batch, device="meta"), torch.empty(batch, d.classes, device="meta"))
    return traffic.found


def rows(
    found: dict[str, list[int]], batch: int, flops_rate: float, byte_rate: float
) -> Iterator[list[str]]:
    everything, traffic = (sum(each[i] for each in found.values()) for i in (0, 1))
    least = 0.0
    for kind, (flops, moved) in sorted(found.items(), key=lambda item: -item[1][0]):
        seconds = max(flops / flops_rate, moved / byte_rate)
        least += seconds
        yield [kind, *_numbers(flops, moved, batch), f"{seconds * 1e3:.3g}"]
    yield ["all, kernel by kernel", *_numbers(everything, traffic, batch), f"{least * 1e3:.3g}"]
    gflop, ms = everything / batch / 1e9, everything / flops_rate * 1e3
    yield ["operations alone", f"{gflop:.4g}", "", "", f"{ms:.3g}"]


def _numbers(flops: int, moved: int, batch: int) -> list[str]:
    return [f"{flops / batch / 1e9:.4g}", f"{moved / batch / 1e6:.4g}", f"{flops / moved:.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="params.yaml")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tflops", type=float, default=989, help="dense, in the precision; H200")
    parser.add_argument("--gbs", type=float, default=4800, help="memory, GB/s; H200")
    o = parser.parse_args()
    found = forward_traffic(load_params(o.preset), o.batch)
    head = ["kernels", "GFLOP an image", "MB an image", "FLOP a byte", f"ms for {o.batch}"]
    print(*table(head, rows(found, o.batch, o.tflops * 1e12, o.gbs * 1e9)), sep="\n")


if __name__ == "__main__":
    main()
