"""Multistep consistency distillation (Heek et al. 2024) in EDM's noise-level coordinates.

The student's steps cut [0, sigma_max] into segments. On a random edge of a finer teacher grid, the
frozen teacher hops from sigma_t to sigma_s. From there the student itself predicts where the
segment ends, and that end is the target for its prediction at sigma_t.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.distributed import to_device
from fewstep.logs import Logged, by_group, by_sigma, mean_of
from fewstep.method import Method, Networks
from fewstep.networks.denoiser import Denoiser
from fewstep.params.fields import KimgOrZero, Several, Share, asks, block, one_of
from fewstep.params.methods import OwnGrid, Problem
from fewstep.theory import noise
from fewstep.theory.losses import DISTANCES, WEIGHTS, distance, loss_weight
from fewstep.theory.noise import Schedule, per_image
from fewstep.theory.solve import ConditionalDenoise, ddim_step, inverse_ddim


@block(kw_only=True)
class Settings(OwnGrid):
    steps: Several
    """segments of the student's grid. The student samples in as many steps"""
    teacher_edges: Annotated[
        tuple[Several, Several], asks("a list of two integers >= 2, start and end")
    ]
    """solver steps of the teacher's grid, at the start and at the end of the annealing"""
    anneal_kimg: KimgOrZero
    """length of the log-linear annealing of teacher_edges. With 0, training starts on the final
    grid"""
    edges: Literal["uniform", "vp", "edm"]
    """distribution that teacher edges are drawn from. `uniform` gives all segments equal shares"""
    uniform_share: Share | None = None
    """share of edges drawn uniformly over segments; absent = 0. The others follow `edges`"""
    terminal_anchor: bool
    """raises the probability of the last edge under vp and edm. It becomes 1 over the number of
    edges"""
    terminal_teacher_hop: bool
    """the target on the last edge is a teacher step; false: the clean image"""
    addim: Share | None = None
    """the teacher hops by aDDIM, which adds this share of its squared error as variance; absent =
    Heun's step. Heek et al. add 0.75, against images that DDIM makes too smooth"""
    sync_dropout: bool
    """prediction and target use the same dropout masks; false: the target uses no dropout"""
    distance: Annotated[str, one_of(DISTANCES)]
    """distance between prediction and target"""
    weight: Annotated[str, one_of(WEIGHTS)]
    """weight of the loss as a function of sigma"""

    @property
    def sampling(self) -> tuple[str, int]:
        return "ddim", self.steps

    def check(self, at: str) -> Iterator[Problem]:
        start, end = self.teacher_edges
        if not start <= end:
            message = f"need start <= end in teacher_edges, got {start} and {end}"
            yield f"{at}.teacher_edges", message


SEGMENT_SHARE = 1e-3  # warn about a segment that sees a smaller share of the training's images
MOMENTS = 100  # points of the annealing at which the images of each segment are estimated


@dataclass(frozen=True)
class Edges:
    """One teacher edge per image, all of shape (B,); sigmas are float64.

    The teacher hops from `sigma_t` to `sigma_s`, which is the segment's lower boundary `sigma_b` on
    the last edge above it (`snap`), and 0 on the last edge of the grid (`terminal`).
    """

    segment: Tensor
    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    snap: Tensor
    terminal: Tensor

    @property
    def general(self) -> Tensor:
        """Edges that are neither snap nor terminal: their target needs the student at sigma_s."""
        return ~(self.snap | self.terminal)

    def to(self, device: torch.device) -> "Edges":
        return Edges(*(to_device(t, device) for t in vars(self).values()))


@dataclass(frozen=True)
class Grid:
    """Student and teacher nodes, the segments' bounds, and each teacher edge's probability."""

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
        p = noise.edge_probability(teacher, bounds, kind, anchor, rho, uniform_share)
        return cls(student, teacher, bounds, p)

    def draw(self, n: int, generator: torch.Generator | None) -> Edges:
        """n independent edges. The CPU draws them, so that every device trains on the same ones."""
        return self.edges(torch.multinomial(self.probability, n, True, generator=generator))

    def edges(self, k: Tensor) -> Edges:
        """The edges with indices k, int64 (B,)."""
        segment = (torch.searchsorted(self.bounds[:, 0].contiguous(), k, right=True) - 1).clamp(0)
        sigma_b = self.student[segment + 1]
        terminal = k == len(self.teacher) - 2
        last = segment == len(self.bounds) - 1
        snap = (k == self.bounds[segment, 1]) & ~last & ~terminal
        sigma_s = torch.where(snap, sigma_b, torch.maximum(self.teacher[k + 1], sigma_b))
        sigma_s = torch.where(terminal, 0.0, sigma_s)
        sigma_t = self.teacher[k]
        assert bool((sigma_t > sigma_s + 1e-8).all()), "an edge leads to a smaller sigma"
        return Edges(segment, sigma_t, sigma_s, sigma_b, snap, terminal)


def addim_hop(D_t: Tensor, x_t: Tensor, y: Tensor, edges: Edges, share: float) -> Tensor:
    """aDDIM's step from sigma_t to sigma_s for each image, (B, C, H, W), float64.

    DDIM's step to D(x_t) forgets that the clean image is uncertain. aDDIM scales its noise up, so
    that the images at sigma_s vary as much as they should (Heek et al. 2024, Algorithm 2).

    Args:
        D_t: the teacher's clean images.
        y: the clean images that x_t was made of: their distance from D_t is the variance.
        share: of that variance which is added, eta in the paper.
    """
    sigma_t, sigma_s = per_image(edges.sigma_t), per_image(edges.sigma_s)
    variance = share * (y - D_t).square().mean(dim=(1, 2, 3), keepdim=True)
    scale = (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * variance).sqrt()
    hop = D_t + scale * (x_t - D_t) / sigma_t
    return torch.where(per_image(edges.terminal), D_t, hop)


def teacher_hop(teacher: ConditionalDenoise, x_t: Tensor, edges: Edges, labels: Tensor) -> Tensor:
    """Heun's step from sigma_t to sigma_s for each image, (B, C, H, W), float64.

    Terminal edges, which end at 0, take an Euler step, whose result is D(x_t; sigma_t). They still
    cost 2 NFE: calls on part of the batch would have another shape at every step, and for each new
    shape cuDNN tunes, torch.compile compiles and a CUDA graph is captured.
    """
    safe = torch.where(edges.terminal, edges.sigma_t, edges.sigma_s)  # no 0/0 on terminal edges
    sigma_t, sigma_s = per_image(edges.sigma_t), per_image(safe)
    D_t = teacher(x_t, edges.sigma_t, labels).to(x_t)
    slope = (x_t - D_t) / sigma_t
    x_next = x_t + (sigma_s - sigma_t) * slope
    D_next = teacher(x_next, safe, labels).to(x_t)
    slope_next = (x_next - D_next) / sigma_s
    x_s = x_t + (sigma_s - sigma_t) * (slope + slope_next) / 2
    return torch.where(per_image(edges.terminal), D_t, x_s)


def reference_point(
    x_s: Tensor, D_s: Tensor, y: Tensor | None, edges: Edges
) -> tuple[Tensor, Tensor]:
    """Where the student should arrive: images (B, C, H, W) and their sigma (B,), float64.

    General edges: DDIM from x_s to the boundary with the student's own D_s. Snap edges: x_s, which
    is already there. Terminal edges: the clean image y, or x_s, the teacher's, if y is None.
    """
    sigma_s = per_image(edges.sigma_s.clamp(min=1e-12))  # 0 on terminal edges, which discard this
    pushed = ddim_step(x_s, D_s.to(x_s), sigma_s, per_image(edges.sigma_b))
    x_ref = torch.where(per_image(edges.general), pushed, x_s)
    if y is not None:
        x_ref = torch.where(per_image(edges.terminal), y.to(x_s), x_ref)
    return x_ref, torch.where(edges.terminal, 0.0, edges.sigma_b)


def consistency_loss(
    D_t: Tensor, target: Tensor, sigma_t: Tensor, kind: str, weight: str, sigma_data: float
) -> Tensor:
    """Weighted distance for each image, summed over its elements, (B,), float32."""
    w = per_image(loss_weight(weight, sigma_t.to(torch.float32), sigma_data))
    return (w * distance(kind, D_t - target)).flatten(1).sum(dim=1)


class Consistency(Method):
    """`student` learns to jump to the lower boundary of its segment in one step."""

    def __init__(
        self, student: Denoiser, teacher: Denoiser, settings: Settings, schedule: Schedule
    ) -> None:
        super().__init__(student, teacher.eval().requires_grad_(False))
        self.teacher, self.settings, self.schedule = teacher, settings, schedule
        self.student_sigmas = Schedule.of(settings.grid(schedule)).nodes(settings.steps)
        self.grids: dict[int, Grid] = {}

    def grid(self, kimg: float) -> Grid:
        """The grid at that time, cached by its number of edges, which changes slowly."""
        s = self.settings
        edges = noise.annealed_teacher_edges(kimg, *s.teacher_edges, s.anneal_kimg)
        if edges not in self.grids:
            how = s.edges, s.terminal_anchor, self.schedule.rho, s.uniform_share or 0.0
            self.grids[edges] = Grid.build(self.student_sigmas, edges, *how)
        return self.grids[edges]

    def loss(
        self, phase: str, batch: Batch, prepared: None = None
    ) -> tuple[Tensor, dict[str, Logged]]:
        grid = self.grid(batch.kimg)
        edges = grid.draw(len(batch.images), batch.cpu_generator).to(batch.images.device)
        n = batch.normal_like(batch.images)
        loss, error = self.edge_loss(batch.images, batch.labels, edges, n)
        return loss.mean(), self.diagnostics(loss.detach(), error, edges)

    def forwards(self, encoder: float) -> float:
        # teacher's hop 2, or 1 of aDDIM; student 1, its backward pass 2, target 1
        return 6.0 if self.settings.addim is None else 5.0

    def warnings(self, kimg: float) -> Iterator[tuple[str, str]]:
        """Name segments that see too few images. With `edm` edges the noisiest sees 0.004 %."""
        total = kimg * 1000
        for segment, images in enumerate(seen := self.images_by_segment(kimg)):
            if images < SEGMENT_SHARE * total:
                yield (
                    "uniform_share",
                    f"segment {segment + 1} of {len(seen)} (1 has most noise) will see "
                    f"{images:,.0f} of {total:,.0f} images",
                )

    def images_by_segment(self, kimg: float) -> list[float]:
        """Images that each segment sees in a training of that length, the noisiest first."""
        seen = torch.zeros(self.settings.steps, dtype=torch.float64)
        for moment in range(MOMENTS):
            grid = self.grid(kimg * (moment + 0.5) / MOMENTS)
            for segment, (first, last) in enumerate(grid.bounds.tolist()):
                seen[segment] += grid.probability[first : last + 1].sum() / grid.probability.sum()
        return (seen / MOMENTS * kimg * 1000).tolist()

    def diagnostics(self, loss: Tensor, error: Tensor, edges: Edges) -> dict[str, Logged]:
        """Which part of the grid the loss comes from.

        The gain is the factor by which inverse DDIM amplifies an error of the reference point. The
        gradient share of a kind of edge is its part of the sum of weight * error^2.
        """
        weight = loss_weight(self.settings.weight, edges.sigma_t, self.student.sigma_data)
        gain = 1 / (1 - edges.sigma_b / edges.sigma_t)
        pull = weight * error.double() ** 2
        logs = {"loss": mean_of(loss), **by_sigma("loss", loss, edges.sigma_t)}
        logs["segment/loss"] = by_group(loss, edges.segment, self.settings.steps)
        for kind in ("general", "snap", "terminal"):
            mask = getattr(edges, kind)
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
        # float64, as in the reference: inverse DDIM amplifies rounding errors up to 1,450 times
        x_t = y.to(torch.float64) + per_image(edges.sigma_t) * n.to(torch.float64)
        with torch.no_grad():
            if s.addim is None:
                x_s = teacher_hop(self.teacher, x_t, edges, labels)
            else:
                D_t = self.teacher(x_t, edges.sigma_t, labels).to(x_t)
                x_s = addim_hop(D_t, x_t, y, edges, s.addim)
        state = _rng_state(y.device)  # just before the trained forward, whose masks `target` needs
        D_t = self.student(x_t, edges.sigma_t, labels)
        target = self.target(x_t, x_s, y, labels, edges, state)
        sigma_data = self.student.sigma_data
        loss = consistency_loss(D_t, target, edges.sigma_t, s.distance, s.weight, sigma_data)
        return loss, (D_t.detach() - target).flatten(1).norm(dim=1)

    @torch.no_grad()
    def target(
        self, x_t: Tensor, x_s: Tensor, y: Tensor, labels: Tensor, edges: Edges, state: Tensor
    ) -> Tensor:
        """What D(x_t; sigma_t) should be, float32, from the live student's prediction at x_s.

        With `sync_dropout`, that prediction uses the dropout masks of the trained forward, whose
        random state was `state`; otherwise it uses no dropout.
        """
        # The whole batch runs although only general edges use D_s: masks depend on the batch's
        # shape. The others repeat x_t, a valid input whose output is discarded.
        x = torch.where(per_image(edges.general), x_s, x_t)
        sigma = torch.where(edges.general, edges.sigma_s, edges.sigma_t)
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
    """Draw from `state` again; afterwards the random stream continues where it was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        (torch.cuda if on_gpu else torch).set_rng_state(state)
        yield


def build(networks: Networks, settings: Settings, schedule: Schedule) -> Consistency:
    return Consistency(networks.student(), networks.teacher(), settings, schedule)
