"""Optimisers, learning rates, and the treatment of gradients that are not finite."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distributed import Rank, sum_over_ranks
from fewstep.params import Student

QUIET_STEPS = 32  # steps between checks for non-finite gradients on a GPU, which each wait for it


def learning_rate_factor(block: Student, nimg: int) -> float:
    """Factor of the learning rate after nimg images: linear warm-up, times the schedule.

    inverse_sqrt: Karras et al. 2024 (arXiv:2312.02696), equation 67.
    """
    warmup, total = block.lr_warmup_kimg * 1000, block.kimg * 1000
    rise = min(nimg / warmup, 1.0) if warmup else 1.0
    left = min((total - nimg) / max(total - warmup, 1), 1.0)
    reference = (block.lr_ref_kimg or block.kimg) * 1000
    shapes = {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "inverse_sqrt": max(nimg / reference, 1.0) ** -0.5,
    }
    return rise * shapes[block.lr_schedule]


def mend(parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
    """Replace NaN by 0 and infinity by +-bound in gradients, as EDM's loop; return the old norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient.nan_to_num_(0.0, bound, -bound)
    return norm


class Updates:
    """The optimiser of one network; in fp16 it scales the loss to keep gradients from underflowing.

    The fused optimisers decide on the device whether a gradient is finite, so the CPU need not wait
    at every step; the others must.
    """

    def __init__(
        self,
        network: nn.Module,
        block: Student,
        rate: float,
        precision: str,
        rank: Rank,
        updates: str = "fused",
        betas: tuple[float, float] | None = None,
    ) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.block, self.rate = block, rate
        self.foreach = updates != "loop"
        kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}
        self.fused = updates == "fused" and block.optimizer != "radam"
        options: dict[str, Any] = {
            "betas": betas or block.betas,
            "weight_decay": block.weight_decay,
        }
        options |= {"fused": True} if self.fused else {"foreach": self.foreach}
        self.optimizer: Any = kinds[block.optimizer](self.parameters, rate, **options)
        scale = block.loss_scale or 2.0**16
        self.scaler = torch.amp.GradScaler(rank.device.type, scale, enabled=precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, nimg: int, factor: float = 1.0) -> Tensor:
        """Clip, update, and return the gradient's norm before clipping.

        If that is not finite, no weight changes, unless `nonfinite_to` mends the gradient.

        Args:
            factor: of the learning rate, beside the block's schedule.
        """
        self.scaler.unscale_(self.optimizer)
        bound = self.block.nonfinite_to
        came = None if bound is None else mend(self.parameters, bound)
        limit = self.block.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit, foreach=self.foreach).detach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor * learning_rate_factor(self.block, nimg)
        if self.fused:
            # what GradScaler sets too: the fused kernel skips its update where this is 1
            self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
        elif bool(norm.isfinite()):
            self.optimizer.step()
        self.scaler.update(self.block.loss_scale)  # None adapts the scale
        self.optimizer.zero_grad(set_to_none=True)
        return norm if came is None else came


class NonFinite:
    """Counts gradients that are not finite and stops the training after too many in a row."""

    def __init__(self, limit: int, rank: Rank) -> None:
        self.limit, self.rank = limit, rank
        self.total, self.in_a_row = 0, dict[str, int]()
        self.unseen: list[tuple[str, int, Tensor, Tensor]] = []

    def note(self, phase: str, nimg: int, norm: Tensor, loss: Tensor) -> None:
        """Remember a step's gradient norm and loss without reading them from the device."""
        self.unseen.append((phase, nimg, norm, loss))

    def due(self) -> bool:
        return self.rank.device.type == "cpu" or len(self.unseen) >= QUIET_STEPS

    def check(self) -> Iterator[dict[str, Any]]:
        """Yield phase, nimg, norm and loss of each non-finite gradient since the last check.

        Raises:
            FloatingPointError: the last one makes `limit` in a row.
        """
        steps, self.unseen = self.unseen, []
        norms = torch.stack([norm for *_, norm, _ in steps]).tolist() if steps else []
        for (phase, nimg, _, loss), norm in zip(steps, norms, strict=True):
            if math.isfinite(norm):
                self.in_a_row[phase] = 0
                continue
            self.total += 1
            self.in_a_row[phase] = self.in_a_row.get(phase, 0) + 1
            mean = float(sum_over_ranks(loss.clone(), self.rank)) / self.rank.world
            yield {"nimg": nimg, "nonfinite": phase, "norm": str(norm), "loss": str(mean)}
            if self.in_a_row[phase] >= self.limit:
                raise FloatingPointError(
                    f"the {phase} gradient is {norm} at nimg {nimg}, its loss {mean}: "
                    f"{self.in_a_row[phase]} in a row are not finite. Lower lr or raise precision "
                    "(params.yaml: students.<name>.lr, .max_nonfinite, precision)"
                )
