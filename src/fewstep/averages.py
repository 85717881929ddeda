"""The averages of the student's weights that a training keeps, and their snapshots."""

from copy import deepcopy
from pathlib import Path

from torch import Tensor

from fewstep import ema
from fewstep.denoiser import Denoiser
from fewstep.models import read_safetensors, save_weights
from fewstep.params import Student

SNAPSHOTS = Path("artifacts/snapshots")


class Averages:
    """The average that is saved, and those of power-function profiles for later reconstruction.

    Attributes:
        networks: "average" and, for each of phema.stds, "phema_<std>".
    """

    def __init__(self, student: Denoiser, block: Student, foreach: bool = True) -> None:
        self.block, self.foreach = block, foreach
        self.stds = {f"phema_{std}": std for std in (block.phema.stds if block.phema else ())}
        self.networks = {
            name: deepcopy(student).requires_grad_(False).eval() for name in ("average", *self.stds)
        }

    @property
    def evaluated(self) -> Denoiser:
        return self.networks["average"]

    def update(self, student: Denoiser, nimg: int) -> None:
        """Take in the weights after the images [nimg, nimg + batch)."""
        weights = list(student.parameters())
        for name, network in self.networks.items():
            beta = self.beta(name, nimg)
            ema.update_average(network.parameters(), weights, beta, self.foreach)

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

    def snapshot(self, folder: Path, nimg: int) -> None:
        """Write the profiles of this moment for `reconstruct`."""
        for name, std in self.stds.items():
            file = folder / f"phema-{nimg:012d}-{std}.safetensors"
            save_weights(file, self.networks[name].state_dict(), {"nimg": nimg, "std": std})


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
