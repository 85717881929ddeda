"""Averages of the student's weights during training, and snapshots of them."""

from copy import deepcopy
from pathlib import Path

from torch import Tensor

from fewstep.networks.denoiser import Denoiser
from fewstep.networks.weights import read_safetensors, save_weights
from fewstep.params import Student
from fewstep.theory import ema


class Averages:
    """The average to save, and power-function averages for post-hoc reconstruction.

    Each costs a copy of the weights on the device.

    Attributes:
        networks: "average" and, for each of phema.stds, "phema_<std>"; frozen, in eval mode.
    """

    def __init__(self, student: Denoiser, block: Student, foreach: bool = True) -> None:
        self.student, self.block, self.foreach = student, block, foreach
        self.stds = {f"phema_{std}": std for std in (block.phema.stds if block.phema else ())}
        self.networks: dict[str, Denoiser] = {
            name: deepcopy(student).requires_grad_(False).eval() for name in ("average", *self.stds)
        }

    def update(self, nimg: int) -> None:
        """Include the student's weights as they are after the images [nimg, nimg + batch)."""
        for name, network in self.networks.items():
            weights = (network.parameters(), self.student.parameters())
            ema.update_average(*weights, self.beta(name, nimg), self.foreach)

    def beta(self, name: str, nimg: int) -> float:
        """Decay of that average in an iteration that begins at nimg."""
        batch, e = self.block.batch, self.block.ema
        if name in self.stds:
            return ema.power_beta(batch, nimg + batch, self.stds[name])
        if e.kind == "half_life":
            return ema.half_life_beta(batch, nimg, e.kimg or 0.0, e.rampup or 0.0)
        if e.kind == "power":
            return ema.power_beta(batch, nimg + batch, e.std or 0.0)
        return 0.0  # kind `none`: a copy of the student

    def snapshot(self, folder: Path, nimg: int, first: bool = True) -> None:
        """Write the power-function averages at nimg for `reconstruct`; only the first rank does."""
        for name, std in self.stds.items() if first else ():
            file = folder / f"phema-{nimg:012d}-{std}.safetensors"
            save_weights(file, self.networks[name].state_dict(), {"nimg": nimg, "std": std})


def reconstruct(folder: Path, std: float, kimg: float | None) -> tuple[dict[str, Tensor], dict]:
    """Weights of the power-function average of width std at kimg (EDM2, section C.3).

    They are the least-squares combination of the snapshots in `folder`, up to the first one at or
    after that time.

    Args:
        kimg: None for the time of the last snapshot.

    Returns:
        float32 weights, and which snapshots contributed how much.

    Raises:
        ValueError: no snapshots, a std outside (0, 0.289), or a time outside that of the snapshots.
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
            f"need kimg from {min(times) / 1000} to {max(times) / 1000}, as snapshots in {folder}, "
            f"got {kimg} (--kimg)"
        )
    end = min(t for t in times if t >= nimg)
    used = [i for i, t in enumerate(times) if t <= end]
    X = ema.posthoc_coefficients([times[i] for i in used], [stds[i] for i in used], [nimg], [std])
    shares = {found[i]: float(c) for i, c in zip(used, X[:, 0], strict=True)}
    total: dict[str, Tensor] = {}
    for file, share in shares.items():  # one file at a time, to hold two networks at most
        for name, weight in read_safetensors(file)[0].items():
            total[name] = total.get(name, 0) + share * weight.double()
    snapshots = {file.name: share for file, share in shares.items()}
    about = {"kimg": nimg / 1000, "std": std, "snapshots": snapshots}
    return {name: weight.float() for name, weight in total.items()}, about
