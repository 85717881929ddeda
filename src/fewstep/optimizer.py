"""Optimisers, learning rates, and steps that leave out or mend gradients that are not finite."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distributed import Rank, sum_over_ranks
from fewstep.params import Student

QUIET_STEPS = 32  # a GPU may run that many steps ahead of the look for non-finite gradients


def learning_rate_factor(block: Student, nimg: int) -> float:
    """Share of the learning rate after nimg images: linear warm-up, then the schedule to 0."""
    warmup, total = block.lr_warmup_kimg * 1000, block.kimg * 1000
    if nimg < warmup:
        return nimg / warmup
    left = (total - nimg) / max(total - warmup, 1)
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return shapes[block.lr_schedule]


def mend(parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
    """Make NaN 0 and infinity +-bound in gradients, in place; their norm before (EDM's loop)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient.nan_to_num_(0.0, bound, -bound)
    return norm


class Updates:
    """The optimiser of one network; in fp16 its loss is scaled so that gradients do not underflow.

    Whether a gradient is finite is decided on the device: a step that is left out costs no wait.
    """

    def __init__(
        self,
        network: nn.Module,
        block: Student,
        rate: float,
        precision: str,
        rank: Rank,
        updates: str = "fused",
        shard: bool = False,
    ) -> None:
        self.parameters, self.block, self.rate = list(network.parameters()), block, rate
        self.foreach = updates != "loop"
        kinds = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "radam": torch.optim.RAdam,
        }
        self.fused = updates == "fused" and block.optimizer != "radam"
        options: dict[str, Any] = {"betas": block.betas, "weight_decay": block.weight_decay}
        options |= {"fused": True} if self.fused else {"foreach": self.foreach}
        kind = kinds[block.optimizer]
        self.sharded = shard and rank.world > 1
        if self.sharded:  # ZeRO, stage 1
            from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

            self.optimizer = ZeroRedundancyOptimizer(self.parameters, kind, lr=rate, **options)
        else:
            self.optimizer = kind(self.parameters, rate, **options)
        scale = block.loss_scale or 2.0**16
        self.scaler = torch.amp.GradScaler(rank.device.type, scale, enabled=precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, nimg: int) -> Tensor:
        """Clip and update; the gradient's norm as it came.

        Where that is not finite nothing changes, unless `nonfinite_to` mends the gradient.
        """
        self.scaler.unscale_(self.optimizer)
        bound = self.block.nonfinite_to
        came = None if bound is None else mend(self.parameters, bound)
        limit = self.block.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit, foreach=self.foreach).detach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * learning_rate_factor(self.block, nimg)
        if self.fused:
            own: Any = self.optimizer.optim if self.sharded else self.optimizer
            own.found_inf = (~norm.isfinite()).float()  # the kernel then changes nothing
            self.optimizer.step()
        elif bool(norm.isfinite()):
            self.optimizer.step()
        self.scaler.update(self.block.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        return norm if came is None else came

    def collect(self) -> None:
        """Bring a sharded state to the first rank, which saves it; every rank calls this."""
        if self.sharded:
            self.optimizer.consolidate_state_dict(0)


class NonFinite:
    """Counts gradients that are not finite, and stops the training after too many in a row."""

    def __init__(self, limit: int, rank: Rank) -> None:
        self.limit, self.rank = limit, rank
        self.total, self.in_a_row = 0, dict[str, int]()
        self.unseen: list[tuple[str, int, Tensor, Tensor]] = []

    def note(self, phase: str, nimg: int, norm: Tensor, loss: Tensor) -> None:
        """Remember a step's gradient norm and its loss, without looking at them."""
        self.unseen.append((phase, nimg, norm, loss))

    def due(self) -> bool:
        return self.rank.device.type == "cpu" or len(self.unseen) >= QUIET_STEPS

    def check(self) -> Iterator[dict[str, Any]]:
        """What was not finite since the last look: phase, nimg, gradient norm and loss of each.

        Raises:
            FloatingPointError: `limit` in a row, after all were told.
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
