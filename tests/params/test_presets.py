"""The presets of ImageNet-64 and CIFAR-10 say what was published, number by number."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.download import downloads
from fewstep.metrics import inception
from fewstep.metrics.reference import floor_images
from fewstep.networks.registry import build_denoiser
from fewstep.params import Download, Params, Student, load_params
from fewstep.planning.plan import images_needed
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import nfe
from fewstep.training.optimizer import learning_rate_factor

CONFIG = Path(__file__).parents[2] / "config"


@cache
def preset(name: str) -> Params:
    return load_params(CONFIG / f"{name}.yaml")


def student(block: Student) -> dict[str, Any]:
    return asdict(block)


def shown(block: Student, expected: dict[str, Any]) -> dict[str, Any]:
    """The values of a block at the keys that are expected, nested ones too."""
    have = student(block)
    return {
        key: {k: have[key][k] for k in value} if isinstance(value, dict) else have[key]
        for key, value in expected.items()
    }


# --- data, network and noise of ImageNet-64 ------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet64", "imagenet64-cd-seed", "imagenet64-dmd2-seed"])
def test_the_teacher_of_imagenet64_is_edms_adm(name: str) -> None:
    params = preset(name)
    d, n, z = params.data, params.network, params.noise
    assert (d.resolution, d.channels, d.classes) == (64, 3, 1000)
    assert (n.type, n.model_channels, n.channel_mult, n.num_blocks) == ("adm", 192, (1, 2, 3, 4), 3)
    assert (n.attn_resolutions, n.sigma_data) == ((32, 16, 8), 0.5)
    assert (z.sigma_min, z.sigma_max, z.rho) == (0.002, 80.0, 7.0)
    url = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"
    assert params.teacher.url == url
    row = params.rows["teacher-churn-511"]
    assert row.churn is not None and nfe(row.sampler, row.steps) == 511
    assert asdict(row.churn) == {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
    assert params.generate.images == 50_000


def test_the_teacher_of_imagenet64_edm2_is_edm2s_of_size_s() -> None:
    params, edm = preset("imagenet64-edm2"), preset("imagenet64")
    n = params.network
    assert (n.type, n.model_channels, n.channel_mult, n.num_blocks) == (
        "edm2",
        192,
        (1, 2, 3, 4),
        3,
    )
    assert (n.attn_resolutions, n.sigma_data) == ((16, 8), 0.5)
    assert (params.data, params.noise, params.metric) == (edm.data, edm.noise, edm.metric)
    assert params.students.keys() == edm.students.keys()
    folder = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
    assert params.teacher.url == f"{folder}/edm2-img64-s-1073741-0.075.pkl"


@pytest.mark.parametrize(
    ("name", "millions"),
    [("imagenet64", 295.9), ("imagenet64-edm2", 280.2), ("cifar10", 55.7)],
)
def test_networks_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    import torch

    with torch.device("meta"):
        count = sum(p.numel() for p in build_denoiser(preset(name)).parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    "name",
    ["imagenet64", "imagenet64-edm2", "imagenet64-cd-seed", "imagenet64-dmd2-seed", "cifar10"],
)
def test_presets_for_gpus_never_train_on_a_cpu_but_are_checked_and_planned_there(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preset(name).device == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for stage in ("check", "plan"):
        main([stage, "--params", str(CONFIG / f"{name}.yaml")])
    assert "hardware: 1 x 8 x h100" in capsys.readouterr().out


# --- the metric and the rows that calibrate it ---------------------------------------------------

LARGE = ["imagenet64", "imagenet64-edm2", "imagenet64-cd-seed", "imagenet64-dmd2-seed", "cifar10"]
CALIBRATION = {  # sampler and network calls of the teacher's rows
    "imagenet64": {("churn", 511), ("heun", 511), ("heun", 79), ("euler", 8)},
    "imagenet64-edm2": {("heun", 63), ("euler", 8)},
    "cifar10": {("heun", 35), ("euler", 8)},
}


@pytest.mark.parametrize("name", LARGE)
def test_the_teacher_is_measured_as_published(name: str) -> None:
    params = preset(name)
    rows = [row for row in params.rows.values() if row.model == "teacher"]
    assert all(row.guidance_scale == 1 for row in rows)
    found = {(row.sampler, nfe(row.sampler, row.steps)) for row in rows}
    assert found == CALIBRATION[name.removesuffix("-cd-seed").removesuffix("-dmd2-seed")]
    assert (params.generate.images, params.generate.seed_ranges) == (50_000, 3)


@pytest.mark.parametrize("name", LARGE)
def test_the_metric_is_the_fid_of_the_papers_beside_all_others(name: str) -> None:
    m = preset(name).metric
    assert m.features == "inception-2015" and m.weights == Download(inception.URL, inception.SHA256)
    file = "cifar10-32x32.npz" if name == "cifar10" else "imagenet-64x64.npz"
    assert m.reference is not None
    assert m.reference.url == f"https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/{file}"
    assert all((m.kid, m.manifold, m.memorisation, m.inception_score, m.bootstrap))


@pytest.mark.parametrize("name", LARGE)
def test_the_data_have_the_images_that_the_preset_needs(name: str) -> None:
    have = 50_000 if name == "cifar10" else 1_281_167
    assert images_needed(preset(name)) <= have
    assert floor_images(preset(name), have) >= 10_000


@pytest.mark.parametrize("name", LARGE)
def test_all_downloads_are_known_or_say_that_they_are_not(name: str) -> None:
    """Of NVIDIA's files nobody tells the sha256."""
    for key, file in downloads(preset(name)):
        assert (file.sha256 == "unknown") == ("nvidia.com" in file.url), key


# --- consistency distillation as released --------------------------------------------------------

CD = {
    "method": "consistency",
    "init_from": "teacher",
    "kimg": 210_000.0,  # duration 210 Mimg; the released network is that of 157,698
    "batch": 2048,
    "batch_gpu": 64,
    "lr": 8e-5,
    "lr_warmup_kimg": 10_000.0,
    "lr_schedule": "constant",
    "optimizer": "adam",
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "max_nonfinite": 1_000_000,  # it never stops
    "nonfinite_to": 1e5,
    "loss_scale": 1.0,
    "dropout": 0.2,
    "dropout_resolutions": (16, 8),
    "ema": {"kind": "half_life", "kimg": 50_000.0, "rampup": 0.05},
    "phema": {"stds": (0.05, 0.1), "snapshot_kimg": 60 * 50.0},  # 60 ticks of 50 kimg
    "checkpoint_kimg": 20 * 50.0,
    "keep_checkpoints": 2,
    "validation": {
        "every_kimg": 20 * 50.0,
        "images": 50_000,
        "first_seed": 0,
        "reference_images": 1_281_167,
        "sampler": "euler",
        "steps": 8,
        "guidance_scale": 1.0,
        "teacher": None,  # the reference's baseline never runs
    },
    "settings": {
        "steps": 8,
        "teacher_edges": (64, 1280),
        "anneal_kimg": 104_800.0,
        "edges": "edm",
        "uniform_share": None,
        "terminal_anchor": True,
        "terminal_teacher_hop": True,
        "sync_dropout": True,
        "distance": "pseudo_huber",
        "weight": "sqrt_karras",
    },
}


def test_cd_seed_is_the_released_recipe() -> None:
    params = preset("imagenet64-cd-seed")
    assert (params.seed, params.precision) == (1959836853, "fp16")
    assert shown(params.students["cd-8"], CD) == CD
    assert params.generate.labels == "random" and params.generate.first_seed == 0
    row = params.rows["cd-8"]
    assert (row.sampler, row.steps, nfe(row.sampler, row.steps)) == ("euler", 8, 8)


def test_cd_seed_anneals_in_the_published_number_of_iterations() -> None:
    block = preset("imagenet64-cd-seed").students["cd-8"]
    assert CD["settings"]["anneal_kimg"] * 1000 / block.batch == pytest.approx(51_172, abs=1)
    assert 157_698_048 // block.batch == 77_001


# --- DMD2 as released ----------------------------------------------------------------------------

DMD2 = {
    "method": "dmd2",
    "lr_schedule": "constant",
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "grad_clip": 10.0,
    "nonfinite_to": None,
    "loss_scale": None,
    "dropout": 0.0,
    "dropout_resolutions": None,
    "ema": {"kind": "none"},
    "phema": None,
    "settings": {
        "update_ratio": 5,
        "noise_levels": 1000,
        "dm_levels": (0.02, 0.98),
        "dm_epsilon": 0.0,
        "dm_nan_to_num": True,
        "gan_levels": 1000,
        "gan_groups": 32,
        "shared_label_drop": False,
        "teacher_eval": False,
    },
}
RUNS = [  # name, GPUs, iterations, lr, GAN, steps, init_from
    ("dmd2-1", 7, 405_500, 2e-6, False, 1, "teacher"),
    ("dmd2-1-gan", 7, 193_500, 2e-6, True, 1, "teacher"),
    ("dmd2-1-long", 7, 142_500, 5e-7, True, 1, "dmd2-1"),
    ("dmd2-10", 8, 500_000, 5e-7, True, 10, "teacher"),
    ("dmd2-10-from-1", 8, 500_000, 5e-7, True, 10, "dmd2-1-long"),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_dmd2_seed_is_the_released_recipes(run: tuple[Any, ...]) -> None:
    name, gpus, iterations, lr, gan, steps, init_from = run
    params = preset("imagenet64-dmd2-seed")
    block = params.students[name]
    assert (params.seed, params.precision) == (10, "bf16")
    assert shown(block, DMD2) == DMD2
    s = student(block)["settings"]
    assert (block.batch, block.batch_gpu) == ((280, 40) if gpus == 7 else (256, 32))
    assert block.batch == gpus * block.batch_gpu
    assert block.kimg * 1000 == iterations * block.batch
    assert block.lr == s["fake_score_lr"] == lr
    assert (s["gan_student_weight"], s["gan_critic_weight"]) == ((3e-3, 1e-2) if gan else (0, 0))
    assert (s["steps"], s["backward_simulation"], block.init_from) == (steps, steps > 1, init_from)
    assert s["label_dropout"] == (0.1 if steps > 1 else 0.0)
    critic = {"dmd2-1": (True, None), "dmd2-1-long": (None, True)}  # long: fresh optimisers, too
    assert (s["save_critic"], s["continue_critic"]) == critic.get(name, (None, None))
    assert s["separate_labels"] == (True if steps > 1 else None)  # one step draws them uniformly


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_dmd2_seed_warms_up_as_accelerate_does(run: tuple[Any, ...]) -> None:
    """The scheduler of 500 steps is advanced once for each GPU in an iteration."""
    block, gpus = preset("imagenet64-dmd2-seed").students[run[0]], run[1]
    for iteration in (0, 1, 30, 61, 62, 71, 72, 1000):
        theirs = min(iteration * gpus / 500, 1.0)
        assert learning_rate_factor(block, iteration * block.batch) == pytest.approx(theirs)


def test_dmd2_seed_samples_at_the_published_sigmas() -> None:
    params = preset("imagenet64-dmd2-seed")
    n, row = params.noise, params.rows["dmd2-10-guided"]
    sigmas = Schedule(n.sigma_min, n.sigma_max, n.rho).sigmas(row.steps).tolist()
    published = [80, 42.4152, 21.1087, 9.7232, 4.06612, 1.50174, 0.469979, 0.116639, 0.0204353]
    assert sigmas == pytest.approx([*published, 0.002], rel=1e-5)
    assert (row.guidance_scale, nfe(row.sampler, row.steps, row.guidance_scale)) == (1.5, 20)
    assert params.generate.labels == "balanced"


# --- ours ----------------------------------------------------------------------------------------


def test_ours_has_the_fixes() -> None:
    params = preset("imagenet64")
    cd = student(params.students["cd-8"])
    assert params.precision == "bf16"
    assert cd["settings"]["edges"] == "edm" and cd["settings"]["uniform_share"] > 0
    for block in params.students.values():
        assert block.lr_schedule != "constant" and block.phema and block.validation
        assert block.ema.kind != "none"
    for name in ("dmd2-1", "dmd2-10"):
        s = student(params.students[name])["settings"]
        assert s["teacher_eval"] and s["shared_label_drop"] and s["dm_epsilon"] > 0
        assert s["label_dropout"] == 0, "the teacher has no unconditional branch"


def test_cifar10_comes_from_its_home() -> None:
    d, n = preset("cifar10").data, preset("cifar10").network
    assert d.url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert d.sha256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert (n.type, n.model_channels, n.channel_mult, n.num_blocks, n.attn_resolutions) == (
        ("ddpmpp", 128, (2, 2, 2), 4, (16,))
    )
