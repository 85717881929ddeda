"""The plan says what training turns out to take."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from experiment import set_up, tiny_params
from fewstep.cli import main
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.methods import names
from fewstep.networks.registry import build_denoiser
from fewstep.params import Download, MemorisationSettings, Params, Performance, load_params
from fewstep.paths import DATA
from fewstep.planning import plan, utilisation
from fewstep.planning.describe import describe, duration
from fewstep.planning.flops import forward_flops
from fewstep.planning.plan import GB, GPUS, Hardware
from fewstep.training.loop import Run
from places import CONFIG

CPU = torch.device("cpu")
H100 = Hardware(GPUS["h100"], 8, 1, 2000 * GB)
STUDENTS = ["cd", "dmd2-1", "dmd2-4", "mm-2"]


@pytest.fixture(scope="module")
def seed() -> Params:
    return load_params(CONFIG / "imagenet64-cd-seed.yaml")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    as_gpus = Performance(layout="contiguous")  # where GroupNorm leaves no other layout
    return replace(set_up(tmp_path, monkeypatch, images=64), performance=as_gpus)


def run_of(name: str, params: Params) -> Run:
    """A run of two micro-batches that has updated each of its networks."""
    block = replace(params.students[name], batch=8, batch_gpu=4, init_from="teacher")
    block = replace(block, validation=None)
    tracking = replace(params.tracking, dvclive=False)
    params = replace(params, students=MappingProxyType({name: block}), tracking=tracking)
    run = Run(name, block, params, Rank(0, 1, CPU), ImageDataset(DATA, params.data.classes))
    run.resume()
    for _ in range(2 if name == "mm-2" else 1):
        run.iterate()
    return run


def size(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# --- the network of the papers -------------------------------------------------------------------


def test_adm_64_is_what_was_published(seed: Params) -> None:
    network = plan.meta_network(seed)
    assert round(plan.count(network) / 1e6, 1) == 295.9
    assert round(forward_flops(network, seed)[0] / 1e9, 1) == 219.3


# --- against a real training ---------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
def test_memory_is_that_of_a_run(name: str, toy: Params) -> None:
    run = run_of(name, toy)
    said = plan.plan_student(name, run.block, run.params, world=1)
    states = [s for u in run.updates.values() for s in u.optimizer.state_dict()["state"].values()]
    moments = (s[key] for s in states for key in ("exp_avg", "exp_avg_sq"))
    averages = run.averages.networks
    average = size(averages["average"].parameters())
    assert said.memory["weights"] == sum(
        size(network.parameters()) for network in plan.networks(run.method)
    )
    assert said.memory["optimiser"] == size(iter(moments))
    assert said.memory["average"] + said.memory["phema"] == average * len(averages)
    trained = [size(network.parameters()) for network in run.method.trained.values()]
    assert said.memory["gradients"] == max(trained)
    two_ranks = plan.plan_student(name, run.block, run.params, world=2)
    assert two_ranks.memory["gradients"] == sum(trained), "each has its buckets"


@pytest.mark.parametrize("name", STUDENTS)
def test_a_state_and_a_model_take_the_planned_room_on_the_disk(name: str, toy: Params) -> None:
    run = run_of(name, toy)
    run.save_state()
    run.checkpoints.wait()
    said = plan.plan_student(name, run.block, run.params)
    (state,) = run.checkpoints.files()
    assert state.stat().st_size == pytest.approx(said.state, rel=0.1)  # names and steps, too
    run.finish()
    model = Path("artifacts/models") / name / "model.safetensors"
    assert model.stat().st_size == pytest.approx(said.model, rel=0.1)


@pytest.mark.parametrize("kind", ["adm", "ddpmpp", "edm2", "ncsnpp"])
def test_kept_activations_are_those_of_a_real_forward_pass(kind: str, toy: Params) -> None:
    params = replace(toy, network=replace(toy.network, type=kind))
    saved = plan.saved_bytes(plan.meta_network(params).train(), params)
    denoiser = build_denoiser(params).train()
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    d = params.data
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = torch.randn(3, d.channels, d.resolution, d.resolution)
        denoiser(x, torch.ones(3), torch.zeros(3, d.classes))
    have = sum(storage.nbytes() for storage in kept.values())
    assert have == pytest.approx(3 * saved.image + saved.cast, rel=0.02)
    ordered = sum(p.numel() for name, p in denoiser.named_parameters() if "qkv.weight" in name)
    assert 0 < saved.encoder_image < saved.image
    if kind == "edm2":  # keeps normalised weights, and again as a layer uses them
        assert 4 * plan.count(denoiser) < saved.cast < 20 * plan.count(denoiser)
    else:  # and filters, but for those whose input needs no gradient
        buffers = denoiser.named_buffers()
        filters = sum(b.nbytes for name, b in buffers if name.endswith("resample_filter"))
        assert 0 <= saved.cast - 4 * ordered <= (filters if kind == "ncsnpp" else 0)


def test_half_precision_halves_activations_but_casts_the_weights(toy: Params) -> None:
    half = replace(toy, precision="bf16")
    single = plan.saved_bytes(plan.meta_network(toy).train(), toy)
    saved = plan.saved_bytes(plan.meta_network(half).train(), half)
    assert saved.image < 0.75 * single.image
    assert saved.cast == pytest.approx(
        2 * plan.count(plan.meta_network(half)), rel=0.25
    )  # not embeddings


# --- time, warnings, the command -----------------------------------------------------------------


def test_hours_are_flops_over_the_rate(seed: Params) -> None:
    (student,) = plan.plan_students(seed)
    images = 210e6 * 6 + 210 * 50_000 * 8  # forward passes of training and of validation
    hours = images * 219.3e9 / (8 * 989e12 * 0.2) / 3600
    assert student.hours(0.2 * H100.peak("bf16")) == pytest.approx(hours, rel=1e-3)
    twice = replace(H100, nodes=2)
    assert student.hours(0.4 * twice.peak("bf16")) == pytest.approx(hours / 4, rel=1e-3)


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(toy: Params) -> None:
    students = list(plan.plan_students(toy))
    (cd,) = [s for s in students if s.name == "cd"]
    memory = cd.total_memory - cd.memory["activations"] / 2 + plan.CONTEXT
    small = replace(H100, gpus=1, gpu=replace(H100.gpu, memory=memory))
    (text, *_) = [w for w in plan.warnings(toy, students, small) if w.startswith("cd: need")]
    fits = int(text.split("; ")[1].split()[0])
    block = replace(cd.block, batch_gpu=fits)
    assert cd.block.batch % fits == 0 and fits < cd.block.batch_gpu
    assert plan.plan_student("cd", block, toy).total_memory + plan.CONTEXT <= memory
    assert "students.cd.batch_gpu" in text


def test_warnings_name_world_disk_and_segments(seed: Params) -> None:
    students = list(plan.plan_students(seed))
    poor = replace(H100, gpus=7, disk=100 * GB)
    texts = "\n".join(plan.warnings(seed, students, poor))
    assert "need a number of processes that divides batch / batch_gpu = 32, got 7" in texts
    assert "got 100 GB free" in texts
    assert "segment 1 of 8 (1 has most noise) will see 7,4" in texts
    rich = [w for w in plan.warnings(seed, students, H100) if "segment" not in w]
    assert [w.split(":")[0] for w in rich] == ["teacher", "metric.reference"]
    assert all("is unknown; `fewstep download-all`" in w for w in rich)


def test_recomputing_is_planned(seed: Params) -> None:
    usual = plan.plan_student("cd-8", seed.students["cd-8"], seed, 8).memory
    thrifty = replace(seed, performance=Performance(recompute=(64, 32)))
    saved = plan.plan_student("cd-8", seed.students["cd-8"], thrifty, 8).memory
    assert saved["optimiser"] == usual["optimiser"]
    assert saved["activations"] < usual["activations"] / 2, "these levels hold most of them"


def test_rows_cost_all_their_seed_ranges(seed: Params) -> None:
    row, images = seed.rows["teacher-heun-79"], 3 * 50_000
    assert plan.row_images(row, seed) == images
    assert plan.row_flops(row, seed, 10**9) == 79 * images * 1e9
    once = replace(seed, generate=replace(seed.generate, seed_ranges=None))
    assert plan.row_flops(row, once, 10**9) == 79 * images * 1e9 / 3
    samples = [plan.disk_parts(params, [])["samples"] for params in (seed, once)]
    assert samples == [len(seed.rows) * images * 3 * 64 * 64, samples[0] / 3]


def test_hours_in_all_are_those_of_trainings_and_rows(seed: Params) -> None:
    lines = describe(seed, [], H100, "h100", 1_281_167, utilisation=0.3)
    calls = 511 + 511 + 79 + 8 + 8
    hours = calls * 150_000 * 219.3e9 / (0.3 * H100.peak("fp16")) / 3600
    assert f"{8 * hours:,.1f} GPU hours: training 0 s, rows {hours:.1f} h" in "\n".join(lines)
    assert any(line.endswith("images of the data: 1,281,167") for line in lines)


def test_images_that_are_needed_are_those_of_references_floor_and_neighbours(toy: Params) -> None:
    small = replace(toy.metric, reference_images=2)
    assert plan.images_needed(replace(toy, metric=small)) == 2 + toy.generate.images
    published = replace(small, reference=Download("ref.npz", "0" * 64))
    assert plan.images_needed(replace(toy, metric=published)) == 4
    looked = replace(published, memorisation=MemorisationSettings(1, 0.1, 500))
    assert plan.images_needed(replace(toy, metric=looked)) == 500


@pytest.mark.parametrize(
    ("hours", "text"), [(23.4, "23 h"), (1.54, "1.5 h"), (0.45, "27 min"), (0.0059, "21 s")]
)
def test_durations_are_in_units_that_one_can_read(hours: float, text: str) -> None:
    assert duration(hours) == text


def test_the_command_prints_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tiny_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["plan", "--gpu", "rtx4090", "--gpus", "1", "--disk", "0.001"])
    text = capsys.readouterr().out
    assert all(f"train {name}: " in text for name in params.students)
    assert all(f"row {name}: " in text for name in params.rows)
    assert "1 x 1 x rtx4090" in text and "warning: disk: need" in text
    with pytest.raises(
        SystemExit, match=r"need --gpu of a100-40.* or cpu, .*, got tpu, 8, 1 and none"
    ):
        main(["plan", "--gpu", "tpu"])
    with pytest.raises(SystemExit, match=r"got h100, 0, 1 and none"):
        main(["plan", "--gpus", "0"])
    with pytest.raises(
        SystemExit, match=r"need --images of at least \d+, got 9 .*reference_images"
    ):
        main(["plan", "--images", "9"])


def test_a_plan_for_this_processor_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["plan", "--gpu", "cpu"])
    text = capsys.readouterr().out
    assert "1 x 1 x cpu, fp32, " in text and "GFLOP/s measured" in text and "GPU" not in text


def test_images_of_a_row_are_those_of_its_own_seed_ranges(toy: Params) -> None:
    row = toy.rows["cd-4"]
    three = replace(toy, generate=replace(toy.generate, seed_ranges=3))
    assert plan.row_images(row, three) == 3 * toy.generate.images
    assert plan.row_images(replace(row, seed_ranges=1), three) == toy.generate.images


def test_the_best_model_takes_the_room_of_a_model_and_is_no_import(toy: Params) -> None:
    (cd,) = [s for s in plan.plan_students(toy) if s.name == "cd"]
    without = replace(cd, block=replace(cd.block, validation=None))
    assert cd.disk_after - without.disk_after == cd.model > 0
    last = replace(toy, rows={k: row for k, row in toy.rows.items() if "@" not in row.model})
    given = [plan.disk_parts(params, [])["teacher and imports"] for params in (toy, last)]
    assert len(last.rows) < len(toy.rows) and given[0] == given[1]


# --- shares of the FLOP/s ------------------------------------------------------------------------


def test_every_share_is_possible_and_says_what_it_is() -> None:
    for share in utilisation.shares():
        assert share.gpu in (*GPUS, "cpu", utilisation.ANY)
        assert share.method in (*names(), "generation", utilisation.ANY)
        assert 0 < share.utilisation <= 1 and share.source
        assert share.kind in ("measured", "published", "guess")
        assert (share.kind == "guess") == (utilisation.ANY in (share.gpu, share.method))


def test_the_most_particular_share_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "shares.csv"
    file.write_text(
        "gpu,method,compile,utilisation,kind,source\n"
        "any,any,any,0.2,guess,nobody\nh100,any,any,0.3,measured,a\n"
        "h100,dmd2,any,0.4,measured,b\nh100,dmd2,blocks,0.5,measured,c\n"
    )
    monkeypatch.setattr(utilisation, "FILE", file)
    utilisation.shares.cache_clear()
    asked = [("h100", "dmd2", "blocks"), ("h100", "dmd2", "none"), ("h100", "x", "none")]
    found = [utilisation.share_of(*each).source for each in [*asked, ("a100", "dmd2", "blocks")]]
    utilisation.shares.cache_clear()
    assert found == ["c", "b", "a", "nobody"]


def test_the_plan_says_which_shares_are_guesses(seed: Params) -> None:
    students = list(plan.plan_students(seed))
    guessed = "\n".join(describe(seed, students, H100, "h100"))
    assert "at 20% (guess)" in guessed
    assert "utilisation: 20% of the FLOP/s for cd-8, rows, guess: nothing was measured" in guessed
    told = "\n".join(describe(seed, students, H100, "h100", utilisation=0.5))
    assert "at 50% (given)" in told and "guess" not in told


def test_gpus_are_known_by_the_names_that_drivers_give_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L4": None,
    }
    assert {name: utilisation.kind_of(name, GPUS) for name in names} == names
