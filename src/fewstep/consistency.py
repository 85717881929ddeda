"""Multistep consistency distillation (Heek et al. 2024) in EDM's noise-level coordinates.

The student's steps cut [0, sigma_max] into segments. On a random edge of a finer teacher grid, the
frozen teacher hops from sigma_t to sigma_s; what the student makes of the landing point, pushed to
the segment's lower boundary, is the target for the student at sigma_t.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep import noise
from fewstep.batch import Batch
from fewstep.denoiser import ConditionalDenoise, Denoiser
from fewstep.distributed import to_device
from fewstep.losses import distance, loss_weight
from fewstep.meter import Logged, by_group, by_sigma, mean_of
from fewstep.noise import per_image
from fewstep.params import ConsistencySettings
from fewstep.params import Noise as NoiseParams
from fewstep.solve import ddim_step, inverse_ddim


@dataclass(frozen=True)
class Edges:
    """One teacher edge an image, all of shape (B,); sigmas float64.

    `sigma_s` is where the teacher hops to: the lower boundary `sigma_b` on the last edge above it
    (`snap`), 0 on the last edge of the grid (`terminal`).
    """

    segment: Tensor
    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    snap: Tensor
    terminal: Tensor

    def to(self, device: torch.device) -> "Edges":
        return Edges(*(to_device(t, device) for t in vars(self).values()))


@dataclass(frozen=True)
class Grid:
    """Student and teacher nodes, segments, and how likely each teacher edge is drawn."""

    student: Tensor
    teacher: Tensor
    bounds: Tensor
    probability: Tensor

    @classmethod
    def build(
        cls,
        student: Tensor,
        edges: int,
        kind: str,
        anchor: bool,
        rho: float,
        uniform_share: float = 0.0,
    ) -> "Grid":
        teacher = noise.teacher_sigmas(edges, student, rho)
        bounds = noise.segments(teacher, student)
        probability = noise.edge_probability(
            teacher, bounds, kind, anchor, rho, uniform_share=uniform_share
        )
        return cls(student, teacher, bounds, probability)

    def draw(self, n: int, generator: torch.Generator | None) -> Edges:
        """n independent edges, drawn on the CPU so that every device trains on the same ones."""
        return self.edges(torch.multinomial(self.probability, n, True, generator=generator))

    def edges(self, k: Tensor) -> Edges:
        """The edges of indices k, int64 (B,)."""
        segment = (torch.searchsorted(self.bounds[:, 0].contiguous(), k, right=True) - 1).clamp(0)
        sigma_b = self.student[segment + 1]
        terminal = k == len(self.teacher) - 2
        last = segment == len(self.bounds) - 1
        snap = (k == self.bounds[segment, 1]) & ~last & ~terminal
        sigma_s = torch.where(snap, sigma_b, torch.maximum(self.teacher[k + 1], sigma_b))
        sigma_s = torch.where(terminal, 0.0, sigma_s)
        sigma_t = self.teacher[k]
        assert bool((sigma_t > sigma_s + 1e-8).all()), "an edge must go down"
        return Edges(segment, sigma_t, sigma_s, sigma_b, snap, terminal)


def teacher_hop(teacher: ConditionalDenoise, x_t: Tensor, edges: Edges, labels: Tensor) -> Tensor:
    """Heun's step from sigma_t to sigma_s for each image, (B, C, H, W), float64.

    Terminal rows, which would land on 0, are Euler steps: D(x_t; sigma_t). Every row costs 2 NFE,
    so that shapes do not depend on what was drawn.
    """
    sigma_t = per_image(edges.sigma_t)
    safe = torch.where(edges.terminal, edges.sigma_t, edges.sigma_s)  # no 0/0 on terminal rows
    D_t = teacher(x_t, edges.sigma_t, labels).to(x_t)
    slope = (x_t - D_t) / sigma_t
    x_next = x_t + (per_image(safe) - sigma_t) * slope
    D_next = teacher(x_next, safe, labels).to(x_t)
    slope_next = (x_next - D_next) / per_image(safe)
    x_s = x_t + (per_image(safe) - sigma_t) * (slope + slope_next) / 2
    return torch.where(per_image(edges.terminal), D_t, x_s)


def reference_point(
    x_s: Tensor, D_s: Tensor, y: Tensor | None, edges: Edges
) -> tuple[Tensor, Tensor]:
    """Where the student should arrive: images (B, C, H, W) and their sigma (B,), float64.

    General edges: DDIM from x_s to the boundary with the student's own D_s. Snap edges land there
    already. Terminal edges end at the clean image y, or at the teacher's answer where y is None.
    """
    pushed = ddim_step(
        x_s, D_s.to(x_s), per_image(edges.sigma_s.clamp(min=1e-12)), per_image(edges.sigma_b)
    )
    general = ~(edges.snap | edges.terminal)
    x_ref = torch.where(per_image(general), pushed, x_s)
    if y is not None:
        x_ref = torch.where(per_image(edges.terminal), y.to(x_s), x_ref)
    return x_ref, torch.where(edges.terminal, 0.0, edges.sigma_b)


def consistency_loss(
    D_t: Tensor, target: Tensor, sigma_t: Tensor, kind: str, weight: str, sigma_data: float
) -> Tensor:
    """Weighted distance of each image, summed over its elements, (B,), float32."""
    w = per_image(loss_weight(weight, sigma_t.to(torch.float32), sigma_data))
    return (w * distance(kind, D_t - target)).flatten(1).sum(dim=1)


@dataclass
class Consistency:
    """The method: `student` learns to jump to the lower boundary of its segment in one step."""

    student: Denoiser
    teacher: Denoiser
    settings: ConsistencySettings
    noise: NoiseParams

    def __post_init__(self) -> None:
        n = self.noise
        nodes = noise.student_sigmas(self.settings.steps, n.sigma_min, n.sigma_max, n.rho)
        self.student_sigmas = nodes
        self.trained: dict[str, nn.Module] = {"student": self.student}
        self.kept: dict[str, nn.Module] = {}
        self.grids: dict[int, Grid] = {}
        self.teacher.eval().requires_grad_(False)

    def phases(self, iteration: int) -> tuple[str, ...]:
        return ("student",)

    def grid(self, kimg: float) -> Grid:
        """The teacher grid of that time, built once for each number of edges."""
        s = self.settings
        edges = noise.annealed_teacher_edges(kimg, *s.teacher_edges, s.anneal_kimg)
        if edges not in self.grids:
            anchor, rho = s.terminal_anchor, self.noise.rho
            share = s.uniform_share or 0.0
            grid = Grid.build(self.student_sigmas, edges, s.edges, anchor, rho, share)
            self.grids[edges] = grid
        return self.grids[edges]

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        """Mean loss of a micro-batch, and what to log."""
        grid = self.grid(batch.kimg)
        edges = grid.draw(len(batch.images), batch.cpu_generator).to(batch.images.device)
        n = batch.normal_like(batch.images)
        loss, error = self.edge_loss(batch.images, batch.labels, edges, n)
        return loss.mean(), self.diagnostics(loss.detach(), error, edges)

    def forwards(self, encoder: float) -> float:
        """What an image costs, in forward passes of the network; backward counts two."""
        return 6.0  # the teacher's hop 2, the student 1 + 2, its target 1

    def diagnostics(self, loss: Tensor, error: Tensor, edges: Edges) -> dict[str, Logged]:
        """Where on the grid the loss comes from.

        The gain is how much an error of the reference point is amplified in the target; the
        gradient share of a kind of edge is its part of the sum of weight * error^2.
        """
        weight = loss_weight(self.settings.weight, edges.sigma_t, self.student.sigma_data)
        gain = 1 / (1 - edges.sigma_b / edges.sigma_t)
        pull = weight * error.double() ** 2
        logs = {"loss": mean_of(loss), **by_sigma("loss", loss, edges.sigma_t)}
        logs["segment/loss"] = by_group(loss, edges.segment, self.settings.steps)
        kinds = {
            "general": ~(edges.snap | edges.terminal),
            "snap": edges.snap,
            "terminal": edges.terminal,
        }
        for kind, mask in kinds.items():
            logs[f"edge/share_{kind}"] = mean_of(mask)
            logs[f"edge/loss_{kind}"] = mean_of(loss, mask)
            logs[f"edge/error_{kind}"] = mean_of(error, mask)
            logs[f"edge/gain_{kind}"] = mean_of(gain, mask)
            logs[f"edge/gradient_share_{kind}"] = (pull * mask).sum(), pull.sum()
        return logs

    def edge_loss(
        self, y: Tensor, labels: Tensor, edges: Edges, n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of each image on its edge, and its Euclidean distance from the target, both (B,)."""
        s = self.settings
        x_t = y.to(torch.float64) + per_image(edges.sigma_t) * n.to(torch.float64)
        with torch.no_grad():
            x_s = teacher_hop(self.teacher, x_t, edges, labels)
        state = _rng_state(y.device)
        D_t = self.student(x_t, edges.sigma_t, labels)
        target = self.target(x_t, x_s, y, labels, edges, state)
        sigma_data = self.student.sigma_data
        loss = consistency_loss(D_t, target, edges.sigma_t, s.distance, s.weight, sigma_data)
        return loss, (D_t.detach() - target).flatten(1).norm(dim=1)

    @torch.no_grad()
    def target(
        self, x_t: Tensor, x_s: Tensor, y: Tensor, labels: Tensor, edges: Edges, state: Tensor
    ) -> Tensor:
        """What D(x_t; sigma_t) should be, float32, from the live student's answer at x_s.

        `sync_dropout` gives that answer the dropout masks of the trained forward, whose random
        state was `state`; without it the student answers without dropout.
        """
        general = ~(edges.snap | edges.terminal)
        x = torch.where(per_image(general), x_s, x_t)
        sigma = torch.where(general, edges.sigma_s, edges.sigma_t)
        if self.settings.sync_dropout:
            with _replayed_rng(state, y.device):
                D_s = self.student(x, sigma, labels)
        else:
            was_training = self.student.training
            D_s = self.student.eval()(x, sigma, labels)
            self.student.train(was_training)
        clean = None if self.settings.terminal_teacher_hop else y
        x_ref, sigma_ref = reference_point(x_s, D_s, clean, edges)
        inverse = inverse_ddim(x_t, x_ref, per_image(edges.sigma_t), per_image(sigma_ref))
        return inverse.to(torch.float32)


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed_rng(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw again from `state`, then go on where the random stream was."""
    now = _rng_state(device)
    set_state = torch.cuda.set_rng_state if device.type == "cuda" else torch.set_rng_state
    set_state(state)
    try:
        yield
    finally:
        set_state(now)
