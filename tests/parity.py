"""Does this code answer what the reference implementations answered? `python tests/parity.py DIR`

DIR holds recorded vectors: small networks, schedules, samplers, losses and gradients of both
methods, a Fréchet distance, a teacher pickle. Prints one line a check and exits 0 only if all hold.
A folder that `reduce_parity.py` made holds fewer rows and lists what it leaves out in REDUCED.json;
in any other folder a missing file or array is an error.
"""

import json
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conftest import EDM
from fewstep.data.batch import Batch
from fewstep.interop.edm_pickle import import_edm_pickle
from fewstep.methods import consistency
from fewstep.methods.consistency import (
    Consistency,
    Edges,
    Grid,
    consistency_loss,
    reference_point,
    teacher_hop,
)
from fewstep.methods.dmd2 import (
    Critic,
    Discriminator,
    Dmd2,
    Generated,
    Settings,
    backward_simulation,
)
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.networks.adm import ADM
from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.denoiser import Denoiser, one_hot
from fewstep.networks.protocol import Architecture
from fewstep.theory import ema, noise
from fewstep.theory.guidance import guided
from fewstep.theory.losses import DISTANCES, WEIGHTS, denoising_loss, gan_student_loss
from fewstep.theory.sample import SeededNoise, sample_edm, sample_renoise

NETWORK = (1e-4, 1e-5)  # rtol and atol of float32 network outputs, losses and gradients
DIRECTION = (1e-4, 3e-5)  # two network outputs' difference, divided by a number below 1
SCHEDULE = (1e-9, 0.0)  # float64 schedules
FLOAT32 = (1e-5, 0.0)  # schedules that a file holds as float32
SOLVED = (1e-9, 1e-13)  # of a linear system in float64: libraries round apart
EXACT = (0.0, 0.0)

Numbers = Tensor | np.ndarray | float | int
Network = Callable[[str], Denoiser]


@dataclass(frozen=True)
class Check:
    """One comparison; `relative` is the error over the largest value."""

    name: str
    error: float
    relative: float
    tolerance: tuple[float, float]
    ok: bool

    def __str__(self) -> str:
        rtol, atol = self.tolerance
        return (
            f"{self.name:<62} error {self.error:8.1e}  relative {self.relative:8.1e}  "
            f"rtol {rtol:5.0e} atol {atol:5.0e}  {'ok' if self.ok else 'FAIL'}"
        )


def check(name: str, ours: Numbers, theirs: Numbers, rtol: float, atol: float) -> Check:
    """|ours - theirs| <= atol + rtol |theirs| for every number; NaN and other shapes fail."""
    a, b = (
        np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64)
        for x in (ours, theirs)
    )
    if a.shape != b.shape or not np.isfinite(b).all():
        return Check(f"{name} {a.shape} for {b.shape}", np.inf, np.inf, (rtol, atol), False)
    error = np.abs(a - b)
    ok = bool((error <= atol + rtol * np.abs(b)).all())
    worst = float(error.max(initial=0))
    return Check(
        name, worst, worst / max(float(np.abs(b).max(initial=0)), 1e-300), (rtol, atol), ok
    )


class Vectors:
    """The arrays of one recorded file, and what a reduced folder leaves out of it."""

    def __init__(self, folder: Path, file: str) -> None:
        manifest = folder / "REDUCED.json"
        self.file, self.reduced = file, manifest.exists()
        entries = (entry.partition(":") for entry in left_out(folder))
        self.left_out = [array for name, _, array in entries if name == file]
        try:
            with np.load(folder / file, allow_pickle=False) as arrays:
                self.arrays = dict(arrays)
        except FileNotFoundError as error:
            raise SystemExit(f"need {file} in {folder}, which is not there") from error
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f"need an .npz file of arrays at {folder / file}: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the array is there; False only for what the folder says it leaves out."""
        return name in self.arrays or not any(fnmatch(name, pattern) for pattern in self.left_out)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.arrays:
            raise SystemExit(f"need {name} in {self.file}, got {len(self.arrays)} other arrays")
        return torch.from_numpy(np.array(self.arrays[name]))

    def config(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["config"]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): self[name] for name in names}

    def check(self, name: str, ours: Numbers, tolerance: tuple[float, float]) -> Iterator[Check]:
        """One check against the array of that name, or against its rows where it is reduced."""
        if not self.has(name):
            return
        theirs = self[name]
        if self.reduced and theirs.ndim:
            ours = ours[: len(theirs)]  # pyright: ignore[reportIndexIssue]
        yield check(f"{self.file.removesuffix('.npz')}: {name}", ours, theirs, *tolerance)


def network(config: dict[str, Any], weights: dict[str, Tensor]) -> Denoiser:
    """The denoiser of EDM's own argument names, with those weights, in eval mode."""
    architecture = Architecture(
        config["img_resolution"],
        config["img_channels"],
        config["label_dim"],
        config["model_channels"],
        tuple(config["channel_mult"]),
        config["num_blocks"],
        tuple(config["attn_resolutions"]),
    )
    if config.get("model_type", "DhariwalUNet") == "DhariwalUNet":
        denoiser = Denoiser(ADM(architecture), 0.5, "fp32")
    else:
        unet = DDPMpp(architecture, config.get("augment_dim", 0))
        denoiser = Denoiser(unet, 0.5, "fp32")
    denoiser.load_state_dict(weights)
    return denoiser.eval()


def in_order(noises: Tensor) -> Callable[[], Tensor]:
    """A source of noise that gives recorded draws one by one."""
    draws = iter(noises)
    return lambda: next(draws)


def grad_norm(loss: Tensor, denoiser: Denoiser) -> Tensor:
    grads = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    return torch.stack([g.norm() for g in grads if g is not None]).norm()


# --- networks and samplers -------------------------------------------------------------------


def forwards(v: Vectors, denoise: Denoiser) -> Iterator[Check]:
    x, sigma, labels = v["x"], v["sigma"], one_hot(v["labels"], 10)
    labels = labels[: len(x)]
    yield from v.check("D_x", denoise(x, sigma, labels), NETWORK)
    yield from v.check("D_x_unconditional", denoise(x, sigma, 0 * labels), NETWORK)


def network_adm(folder: Path, load: Network) -> Iterator[Check]:
    v, denoise = Vectors(folder, "network_adm.npz"), load("a")
    yield from forwards(v, denoise)
    latents = v["latents"]
    labels = one_hot(v["sample_labels"], 10)
    for steps in (5, 18):
        sigmas = EDM.nodes(steps)
        x = sample_edm(denoise, latents, labels, sigmas)
        yield from v.check(f"heun_{steps}_steps", x, NETWORK)
    sigmas = EDM.nodes(18)
    churn = {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    x = sample_edm(denoise, latents, labels, sigmas, noise=in_order(v["churn_noise"]), **churn)
    yield from v.check("churn_18_steps", x, NETWORK)
    seeded = SeededNoise(range(8), (3, 16, 16))
    yield from v.check("seed_latents", seeded(), EXACT)
    yield from v.check("seed_labels", seeded.labels(10), EXACT)
    y, sigma = v["loss_images"], v["loss_sigma"]
    x = y + sigma.reshape(-1, 1, 1, 1) * v["loss_noise"]
    D_x = denoise(x, sigma, one_hot(v["labels"], 10)[: len(y)])
    loss = denoising_loss(D_x, y, sigma, denoise.sigma_data)
    yield from v.check("loss_per_element", loss, NETWORK)


def network_ddpmpp(folder: Path, load: Network) -> Iterator[Check]:
    v = Vectors(folder, "network_ddpmpp.npz")
    yield from forwards(v, network(v.config(), v.under("weights/")))


def edm_structure(folder: Path, load: Network) -> Iterator[Check]:
    """The import gives the weights, the architecture and the outputs of network_adm.npz."""
    v, name = Vectors(folder, "network_adm.npz"), "edm_structure.pkl"
    with tempfile.TemporaryDirectory() as scratch:
        pickle = Path(scratch) / name
        pickle.write_bytes(structure_pickle(folder))
        weights, config = import_edm_pickle(pickle)
    recorded = load("a").state_dict()
    same = list(recorded) == list(weights)
    flat, wanted = (torch.cat([w.flatten() for w in ws.values()]) for ws in (weights, recorded))
    yield check(f"{name}: state-dict names", float(same), 1.0, *EXACT)
    yield check(f"{name}: weights", flat, wanted, *EXACT)
    wanted = {k: x for k, x in v.config().items() if config.get(k) != x}
    yield check(f"{name}: architecture", len(wanted), 0, *EXACT)
    for result in forwards(v, network(config, weights)):
        yield replace(result, name=result.name.replace("network_adm", name))


def structure_pickle(folder: Path) -> bytes:
    """edm_structure.pkl; in a reduced folder its rest, with the tensors of weights a put in."""
    file, hollow = folder / "edm_structure.pkl", folder / "edm_structure_hollow.npz"
    if file.exists() or not hollow.exists():
        try:
            return file.read_bytes()
        except FileNotFoundError as error:
            raise SystemExit(f"need {file.name} in {folder}, which is not there") from error
    v, weights = Vectors(folder, hollow.name), Vectors(folder, "weights_a.npz")
    data = bytearray(v["bytes"].numpy().tobytes())
    for name, offset in zip(v.arrays["names"], v.arrays["offsets"], strict=True):
        tensor = weights.arrays[str(name)].tobytes()
        data[offset : offset + len(tensor)] = tensor
    return bytes(data)


# --- consistency distillation ----------------------------------------------------------------


def consistency_grids(folder: Path, load: Network) -> Iterator[Check]:
    v = Vectors(folder, "consistency_grids.npz")
    for steps, edges in ((8, 64), (8, 256), (8, 1280), (4, 64), (2, 16), (16, 1280)):
        case = f"S{steps}_T{edges}"
        student = EDM.nodes(steps)
        teacher = noise.teacher_sigmas(edges, student, EDM.rho)
        bounds = noise.segments(teacher, student)
        yield from v.check(f"{case}/student_sigmas", student, SCHEDULE)
        yield from v.check(f"{case}/teacher_sigmas", teacher, SCHEDULE)
        yield from v.check(f"{case}/terminal_edge", len(teacher) - 2, EXACT)
        yield from v.check(f"{case}/segments", bounds, EXACT)
        # the recorded table of `uniform` takes the grid for one segment; draws are a segment first
        whole = torch.tensor([[0, len(teacher) - 2]])
        for kind, anchor in product(("uniform", "vp", "edm"), (True, False)):
            parts = whole if kind == "uniform" else bounds
            p = noise.edge_probability(teacher, parts, kind, anchor, EDM.rho)
            name = f"{case}/edge_probability/{kind}/{'anchor' if anchor else 'no_anchor'}"
            yield from v.check(name, p, FLOAT32)
    kimg = v["annealing/kimg"].tolist()
    edges = torch.tensor([noise.annealed_teacher_edges(k, 64, 1280, 104800) for k in kimg])
    yield from v.check("annealing/teacher_edges_64_to_1280_over_104800", edges, EXACT)
    stds = v["phema/std"].tolist()
    exponents = np.array([ema.std_to_exponent(std) for std in stds])
    yield from v.check("phema/exponent", exponents, SCHEDULE)
    betas = np.array([ema.power_beta(2048, 204800, std) for std in stds])
    yield from v.check("phema/beta_at_nimg_204800_batch_2048", betas, SCHEDULE)
    columns = ("in_nimg", "in_std", "out_nimg", "out_std")
    X = ema.posthoc_coefficients(*(v[f"phema/posthoc/{c}"].tolist() for c in columns))
    yield from v.check("phema/posthoc/coefficients", X, SOLVED)


def consistency_losses(folder: Path, load: Network) -> Iterator[Check]:
    v = Vectors(folder, "consistency_loss.npz")
    for (steps, edges), hop in product(((8, 64), (4, 16)), (False, True)):
        case = f"S{steps}_T{edges}/{'terminal_hop' if hop else 'terminal_image'}"
        if v.has(f"{case}/noise"):
            yield from consistency_case(v, case, steps, edges, hop, load)


def consistency_case(
    v: Vectors, case: str, steps: int, teacher_edges: int, hop: bool, load: Network
) -> Iterator[Check]:
    settings = consistency.Settings(
        steps=steps,
        teacher_edges=(teacher_edges, teacher_edges),
        anneal_kimg=0.0,
        edges="edm",
        terminal_anchor=True,
        terminal_teacher_hop=hop,
        sync_dropout=True,
        distance="pseudo_huber",
        weight="sqrt_karras",
    )
    method = Consistency(load("b"), load("a"), settings, EDM)
    grid = method.grid(kimg=0.0)
    n = v[f"{case}/noise"]
    k, y = v[f"{case}/edge/k_t"][: len(n)], v["images"][: len(n)]
    labels = one_hot(v["labels"], 10)[: len(n)]
    edges = grid.edges(k)
    yield from edge_checks(v, f"{case}/edge", grid, k, edges)

    sigma_t = edges.sigma_t.reshape(-1, 1, 1, 1)
    x_t = y.double() + sigma_t * n.double()
    yield from v.check(f"{case}/x_t", x_t, NETWORK)
    with torch.no_grad():
        x_s = teacher_hop(method.teacher, x_t, edges, labels)
        D_s = method.student(x_s, edges.sigma_s.clamp(min=EDM.sigma_min), labels)
        x_ref, sigma_ref = reference_point(x_s, D_s, None if hop else y, edges)
        D_t = method.student(x_t, edges.sigma_t, labels)
    target = method.target(x_t, x_s, y, labels, edges, torch.get_rng_state())
    yield from v.check(f"{case}/x_ref", x_ref, NETWORK)
    yield from v.check(f"{case}/sigma_ref", sigma_ref, SCHEDULE)
    yield from v.check(f"{case}/target", target, NETWORK)
    for kind, weight in product(DISTANCES, (w for w in WEIGHTS if w != "uniform")):
        loss = consistency_loss(D_t, target, edges.sigma_t, kind, weight, 0.5)
        size = y[0].numel() if kind in ("huber", "l2") else 1
        yield from v.check(f"{case}/loss/{kind}/{weight}", loss / size, NETWORK)
    loss, _ = method.edge_loss(y, labels, edges, n)
    yield from v.check(f"{case}/loss/pseudo_huber/sqrt_karras", loss, NETWORK)
    yield from v.check(f"{case}/grad_norm", grad_norm(loss.mean(), method.student), NETWORK)


def edge_checks(v: Vectors, name: str, grid: Grid, k: Tensor, edges: Edges) -> Iterator[Check]:
    yield from v.check(f"{name}/step_j", edges.segment, EXACT)
    yield from v.check(f"{name}/k_s", k + 1, EXACT)
    yield from v.check(f"{name}/n_rel", grid.bounds[edges.segment, 1] - k + 1, EXACT)
    yield from v.check(f"{name}/sigma_t", edges.sigma_t, SCHEDULE)
    landing = torch.where(
        v[f"{name}/is_boundary_snap"], v[f"{name}/sigma_bdry"], v[f"{name}/sigma_s"]
    )
    yield check(f"consistency_loss: {name}/sigma_s", edges.sigma_s, landing, *SCHEDULE)
    yield from v.check(f"{name}/sigma_bdry", edges.sigma_b, SCHEDULE)
    yield from v.check(f"{name}/is_terminal", edges.terminal, EXACT)
    yield from v.check(f"{name}/is_boundary_snap", edges.snap, EXACT)


# --- distribution matching -------------------------------------------------------------------


class ScriptedBatch(Batch):
    """A batch that answers each draw with the next recorded one, and keeps the ranges asked for."""

    def script(self, ints: list[Tensor], normals: list[Tensor]) -> "ScriptedBatch":
        self.ints, self.normals, self.ranges = iter(ints), iter(normals), list[tuple[int, int]]()
        return self

    def uniform_ints(self, low: int, high: int, count: int | None = None) -> Tensor:
        self.ranges.append((low, high))
        return next(self.ints)

    def normal_like(self, x: Tensor) -> Tensor:
        return next(self.normals)


def dmd2(folder: Path, load: Network) -> Iterator[Check]:
    v = Vectors(folder, "dmd2.npz")
    settings = Settings(
        steps=1,
        backward_simulation=False,
        fake_score_lr=1e-4,  # not used
        update_ratio=1,
        noise_levels=1000,
        dm_levels=(0.02, 0.98),
        dm_epsilon=0.0,
        gan_student_weight=0.0,
        gan_critic_weight=1.0,
        gan_levels=1000,
        gan_groups=32,
        label_dropout=0.0,
        shared_label_drop=False,
        teacher_eval=True,
    )
    discriminator = Discriminator(64, settings.gan_groups)
    discriminator.load_state_dict(v.under("classifier/"))
    critic = Critic(load("b"), discriminator)
    method = Dmd2(load("c"), load("a"), critic, settings, EDM)
    labels = one_hot(v["labels"], 10)
    real_labels = one_hot(v["real_labels"], 10)

    def batch(name: str, *suffixes: str) -> ScriptedBatch:
        blank = ScriptedBatch(v["real_images"], real_labels, nimg=0, step_nimg=0, seed=0)
        return blank.script(
            [v[f"{n}/timesteps{s}"] for n, s in zip(name.split(), suffixes, strict=True)],
            [v[f"{n}/noise{s}"] for n, s in zip(name.split(), suffixes, strict=True)],
        )

    yield from v.check("karras_sigmas", method.levels, FLOAT32)
    x = v["images"].requires_grad_()
    yield from matching(v, method, x, labels)

    scripted = batch("gen_cls", "")
    loss = gan_student_loss(*method.logits(scripted, (x, labels)))
    yield from v.check("gen_cls/loss", loss, NETWORK)
    (grad,) = torch.autograd.grad(loss, x)
    yield from v.check("gen_cls/grad_wrt_images", grad, NETWORK)

    scripted = batch("fake guidance_cls guidance_cls", "", "_1", "_0")
    sigma, steps = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.int64)
    made = Generated(x.detach(), sigma, labels, steps, None, images=x.detach())
    loss, logs = method.critic_loss(scripted, made)
    yield from v.check("fake/loss", logs["loss_fake"][0], NETWORK)
    yield from v.check("guidance_cls/loss", logs["loss_gan_critic"][0], NETWORK)
    again = batch("guidance_cls guidance_cls", "_1", "_0")
    fake, real = method.logits(again, (x, labels), (again.images, real_labels))
    yield from v.check("guidance_cls/realism_on_real", real.sigmoid().flatten(), NETWORK)
    yield from v.check("guidance_cls/realism_on_fake", fake.sigmoid().flatten(), NETWORK)
    yield check(
        "dmd2: critic loss is their sum", loss, v["fake/loss"] + v["guidance_cls/loss"], *NETWORK
    )

    scripted = batch("fake", "")
    method.settings = replace(settings, gan_critic_weight=0.0)
    loss, _ = method.critic_loss(scripted, made)
    yield from v.check("fake/grad_norm", grad_norm(loss, critic.fake_score), NETWORK)

    bottleneck = critic.fake_score.bottleneck(x, torch.tensor(0.5), labels)
    yield from v.check("bottleneck", bottleneck, NETWORK)
    yield from dmd2_sampling(v, method.student, labels)


def matching(v: Vectors, method: Dmd2, x: Tensor, labels: Tensor) -> Iterator[Check]:
    """Distribution matching at the recorded noise levels, and the range they are drawn from."""
    t, n = v["dm/timesteps"], v["dm/noise"]
    scripted = ScriptedBatch(x.detach(), labels, nimg=0, step_nimg=0, seed=0)
    made = method.prepare(scripted.script([v["labels"], t], [n, n]))
    method.student_loss(scripted, made)
    low, high = scripted.ranges[-1]
    yield from v.check("min_step", low, EXACT)
    yield from v.check("max_step", high - 1, EXACT)
    loss, direction = method.matching_loss(x, labels, t, n)
    yield from v.check("dm/loss", loss, NETWORK)
    yield from v.check("dm/grad_direction", direction, DIRECTION)
    (grad,) = torch.autograd.grad(loss, x)
    yield from v.check("dm/grad_wrt_images", grad, NETWORK)


def dmd2_sampling(v: Vectors, student: Denoiser, labels: Tensor) -> Iterator[Check]:
    sigmas = EDM.sigmas(10)
    yield from v.check("denoising_sigmas_10", sigmas, FLOAT32)
    for stop in range(10):
        name = f"backward_simulation/{stop}"
        if not v.has(f"{name}/image"):
            continue
        draws = [v[f"{name}/noise_{i}"] for i in range(max(stop, 1))]
        source = iter(draws)
        image = backward_simulation(
            student, sigmas.float(), stop, labels[: len(draws[0])], source.__next__
        )[-1]
        yield from v.check(f"{name}/image", image, NETWORK)
        yield from v.check(f"{name}/sigma", sigmas[stop], FLOAT32)
        yield check(f"dmd2: {name} draws left over", len(list(source)), 0, *EXACT)
    for scale in (1.0, 1.5):
        name = f"sample/{scale}"
        latents, noises = v[f"{name}/latents"], in_order(v[f"{name}/noise"])
        denoise = guided(student, scale)
        x = sample_renoise(denoise, latents, labels[: len(latents)], EDM.nodes(10), noises)
        yield from v.check(f"{name}/images", x, NETWORK)


# --- Fréchet distance ------------------------------------------------------------------------


def frechet(folder: Path, load: Network) -> Iterator[Check]:
    v = Vectors(folder, "frechet.npz")
    for pair in range(3):
        if v.has(f"{pair}/fid"):
            a, b = (gaussian_stats(v[f"{pair}/features_{side}"].numpy()) for side in "ab")
            yield from v.check(f"{pair}/fid", frechet_distance(a, b), SCHEDULE)


FILES: dict[str, Callable[[Path, Network], Iterator[Check]]] = {
    "network_adm.npz": network_adm,
    "network_ddpmpp.npz": network_ddpmpp,
    "consistency_grids.npz": consistency_grids,
    "consistency_loss.npz": consistency_losses,
    "dmd2.npz": dmd2,
    "frechet.npz": frechet,
    "edm_structure.pkl": edm_structure,
}


def checks(folder: Path, file: str) -> Iterator[Check]:
    """Every check of one recorded file; an exception of ours is one that fails, and the last."""

    def load(letter: str) -> Denoiser:
        weights = Vectors(folder, f"weights_{letter}.npz").under("weights/")
        return network(Vectors(folder, "network_adm.npz").config(), weights)

    try:
        yield from FILES[file](folder, load)
    except Exception as error:
        traceback.print_exc()
        yield Check(f"{file}: {type(error).__name__}", np.inf, np.inf, EXACT, False)


def left_out(folder: Path) -> list[str]:
    """What a reduced folder says it does without: `file`, or `file:array` with wildcards."""
    manifest = folder / "REDUCED.json"
    return json.loads(manifest.read_text())["left_out"] if manifest.exists() else []


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(
            f"usage: python tests/parity.py DIR, a folder of vectors; got {arguments}",
            file=sys.stderr,
        )
        return 2
    folder, done, failed = Path(arguments[0]), 0, 0
    for file in FILES:
        if file in left_out(folder):
            print(f"{file}: left out of this reduced folder")
            continue
        for result in checks(folder, file):
            print(result)
            done, failed = done + 1, failed + (not result.ok)
    print(f"{done - failed} of {done} checks hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
