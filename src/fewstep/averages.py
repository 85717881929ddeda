"""The averages of the student's weights that a training keeps, and their snapshots."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep import ema
from fewstep.denoiser import Denoiser
from fewstep.distributed import Rank, broadcast
from fewstep.models import read_safetensors, save_weights
from fewstep.params import Student

SNAPSHOTS = Path("artifacts/snapshots")


class Averages:
    """The average that is saved, and those of power-function profiles for later reconstruction.

    `share` is the rank that keeps its share of each tensor only; None keeps all.

    Attributes:
        names: "average" and, for each of phema.stds, "phema_<std>".
    """

    def __init__(
        self, student: Denoiser, block: Student, foreach: bool = True, share: Rank | None = None
    ) -> None:
        self.student, self.block, self.foreach, self.share = student, block, foreach, share
        self.weights: list[Tensor] = list(student.parameters())
        self.stds = {f"phema_{std}": std for std in (block.phema.stds if block.phema else ())}
        self.names = ("average", *self.stds)
        self.networks: dict[str, Denoiser] = {}
        self.shares: dict[str, list[Tensor]]
        if share is None:
            self.networks = {name: self._copy() for name in self.names}
            self.shares = {name: list(n.parameters()) for name, n in self.networks.items()}
        else:
            self.weights = self._split(self.weights)[share.index]
            self.shares = {name: [t.clone() for t in self.weights] for name in self.names}

    def update(self, nimg: int) -> None:
        """Take in the student's weights after the images [nimg, nimg + batch)."""
        for name, share in self.shares.items():
            ema.update_average(share, self.weights, self.beta(name, nimg), self.foreach)

    @torch.no_grad()
    def whole(self, name: str) -> Denoiser:
        """The network of an average, frozen and in eval mode; every rank calls this.

        It is the average itself or, of a sharded one, a copy.
        """
        if self.share is None:
            return self.networks[name]
        network = self._copy()
        for index, places in enumerate(self._split(network.parameters())):
            lengths = [len(place) for place in places]
            values = places[0].new_empty(sum(lengths))
            if index == self.share.index:
                torch.cat(self.shares[name], out=values)
            broadcast(values, index, self.share)
            for place, value in zip(places, values.split(lengths), strict=True):
                place.copy_(value)
        return network

    def modules(self, wanted: bool = True) -> dict[str, nn.Module]:
        """All of them by name, sharded ones as copies on the CPU; every rank calls this.

        Where they are not `wanted` this rank only tells its share.
        """
        found: dict[str, nn.Module] = {}
        for name in self.names:
            network = self.whole(name)
            if wanted:
                found[name] = network if self.share is None else network.cpu()
        return found

    @torch.no_grad()
    def take(self, networks: Mapping[str, nn.Module]) -> None:
        """Go on from what `modules` gave and a state has changed since."""
        if self.share is None:
            return  # it gave the averages themselves
        for name, share in self.shares.items():
            values = self._split(networks[name].parameters())[self.share.index]
            for own, value in zip(share, values, strict=True):
                own.copy_(value)

    def _copy(self) -> Denoiser:
        return deepcopy(self.student).requires_grad_(False).eval()

    def _split(self, tensors: Iterable[Tensor]) -> list[list[Tensor]]:
        """Each rank's share of each tensor, (n,), as views of it."""
        assert self.share is not None
        split = [t.detach().view(-1).tensor_split(self.share.world) for t in tensors]
        return [list(part) for part in zip(*split, strict=True)]

    def beta(self, name: str, nimg: int) -> float:
        """How much of that average stays in an iteration that begins at nimg."""
        batch, e = self.block.batch, self.block.ema
        if name in self.stds:
            return ema.power_beta(batch, nimg + batch, self.stds[name])
        if e.kind == "half_life":
            return ema.half_life_beta(batch, nimg, e.kimg or 0.0, e.rampup or 0.0)
        if e.kind == "power":
            return ema.power_beta(batch, nimg + batch, e.std or 0.0)
        return 0.0

    def snapshot(self, folder: Path, nimg: int, first: bool = True) -> None:
        """Write the profiles of this moment for `reconstruct`; all ranks call, the first writes."""
        for name, std in self.stds.items():
            network = self.whole(name)
            if first:
                file = folder / f"phema-{nimg:012d}-{std}.safetensors"
                save_weights(file, network.state_dict(), {"nimg": nimg, "std": std})


def reconstruct(folder: Path, std: float, kimg: float | None) -> tuple[dict[str, Tensor], dict]:
    """Weights of the power-function average of width std at kimg (EDM2, section C.3).

    The combination of the snapshots in `folder`, up to the first that is not before that time, that
    is nearest to the profile in least squares. None: the time of the last snapshot.

    Returns:
        float32 weights, and what they are made of.

    Raises:
        ValueError: no snapshots, a std outside (0, 0.289), or a time outside theirs.
    """
    found = sorted(folder.glob("phema-*.safetensors"))
    profiles = [file.stem.split("-", 2)[1:] for file in found]
    times, stds = [int(t) for t, _ in profiles], [float(s) for _, s in profiles]
    if not found:
        raise ValueError(
            f"need snapshots of power-function averages in {folder}, found none; train with "
            "students.<name>.phema: { stds: [0.05, 0.1], snapshot_kimg: ... } (params.yaml)"
        )
    nimg = max(times) if kimg is None else round(kimg * 1000)
    if not min(times) <= nimg <= max(times):
        raise ValueError(
            f"need kimg from {min(times) / 1000} to {max(times) / 1000}, where there are snapshots "
            f"in {folder}, got {kimg} (--kimg)"
        )
    end = min(t for t in times if t >= nimg)
    used = [i for i, t in enumerate(times) if t <= end]
    X = ema.posthoc_coefficients([times[i] for i in used], [stds[i] for i in used], [nimg], [std])
    total: dict[str, Tensor] = {}
    for i, coefficient in zip(used, X[:, 0], strict=True):
        for name, weight in read_safetensors(found[i])[0].items():
            total[name] = total.get(name, 0) + coefficient * weight.double()
    about = {
        "kimg": nimg / 1000,
        "std": std,
        "snapshots": {found[i].name: float(c) for i, c in zip(used, X[:, 0], strict=True)},
    }
    return {name: weight.float() for name, weight in total.items()}, about
