"""How networks are computed changes no result: every choice against the plain one."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CLASSES
from experiment import set_up, tiny_params
from fewstep import noise
from fewstep.averages import SNAPSHOTS
from fewstep.batch import Batch
from fewstep.checkpoint import forget_finished
from fewstep.consistency import Consistency, Grid
from fewstep.data.prefetch import Prefetch
from fewstep.denoiser import Denoiser
from fewstep.distributed import Rank
from fewstep.dmd2 import Critic, Dmd2
from fewstep.ema import update_average
from fewstep.metrics.features import exact_products
from fewstep.models import MODELS, build_denoiser, read_safetensors
from fewstep.optimizer import Updates
from fewstep.params import ConsistencySettings, Dmd2Settings, Params, Performance, load_params
from fewstep.performance import ATTENTION, KINDS_OF_BLOCKS, Graphed, accelerate, tune
from fewstep.sample import sample_renoise
from fewstep.unet import UNet, UNetBlock

ROOT = Path(__file__).parents[1]
TINY = load_params(ROOT / "config" / "tiny.yaml")
CPU = torch.device("cpu")
PLAIN = Performance("contiguous", "plain", "plain", "loop")
slow = pytest.mark.slow
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SWITCHES = {
    "layout: channels_last": {"layout": "channels_last"},
    "attention: fused": {"attention": "fused"},
    "norm: fused": {"layout": "channels_last", "norm": "fused"},
    "recompute: one level": {"recompute": (8,)},
    "recompute: all levels": {"recompute": (16, 8)},
    "cuda_graphs, which a CPU leaves": {"cuda_graphs": True},
    "all but compile": {
        "layout": "channels_last",
        "attention": "fused",
        "norm": "fused",
        "recompute": (8,),
        "cuda_graphs": True,
    },
}
COMPILED = {
    "compile: blocks": {"compile": "blocks"},
    "compile: network, the rest too": {**SWITCHES["all but compile"], "compile": "network"},
}
FROZEN = [
    *(pytest.param(switches, id=name) for name, switches in SWITCHES.items()),
    *(pytest.param(switches, id=name, marks=slow) for name, switches in COMPILED.items()),
]
# each with both networks, but for what takes a minute to compile
ALL = [
    *(
        pytest.param(switches, adm, id=f"{name}, {'adm' if adm else 'ddpmpp'}")
        for name, switches in SWITCHES.items()
        for adm in (True, False)
    ),
    *(
        pytest.param(switches, adm, id=f"{name}, {'adm' if adm else 'ddpmpp'}", marks=slow)
        for (name, switches), adm in zip(COMPILED.items(), (True, False), strict=True)
    ),
]


def network(
    adm: bool = True,
    precision: str = "fp32",
    dropout: float = 0.0,
    frozen: bool = False,
    seed: int = 0,
    **switches: Any,  # noqa: ANN401
) -> Denoiser:
    """A denoiser of 16x16 images with attention at 8x8, whose zero-initialised layers are not 0."""
    torch.manual_seed(seed)
    unet = UNet(16, 1, CLASSES, 32, (1, 2), 1, (8,), dropout, adm=adm)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    how = replace(PLAIN, **switches)
    return accelerate(tune(Denoiser(unet, precision=precision), how), how, frozen)


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 16, 16, generator=generator)
    return x, torch.linspace(0.1, 5, n), torch.eye(CLASSES)[torch.arange(n) % CLASSES]


def outcome(denoiser: Denoiser) -> dict[str, Tensor]:
    """The answer to `inputs` and, where it learns, each gradient; dropout always draws the same.

    The bias of attention's keys is left out: softmax does not see it, its gradient is rounding.
    """
    torch.manual_seed(2)
    answer = denoiser(*inputs())
    found = {"answer": answer.detach()}
    if answer.requires_grad:
        answer.square().mean().backward()
        grads = {k: p.grad for k, p in denoiser.named_parameters() if p.grad is not None}
        found |= {k: g.reshape(-1, 3)[:, ::2] if "qkv.bias" in k else g for k, g in grads.items()}
        denoiser.zero_grad()
    return found


def errors(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the norm of each tensor."""
    assert a.keys() == b.keys()
    return {k: float((a[k] - b[k]).norm() / b[k].norm()) for k in b}


@pytest.mark.parametrize(("switches", "adm"), ALL)
def test_answer_and_gradients_are_the_plain_ones(switches: dict[str, Any], adm: bool) -> None:
    found = errors(outcome(network(adm, **switches)), outcome(network(adm)))
    assert len(found) > 60
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize(("switches", "adm"), ALL)
def test_in_bf16_they_are_as_near_to_fp32_as_the_plain_ones(
    switches: dict[str, Any], adm: bool
) -> None:
    exact = outcome(network(adm))
    plain = errors(outcome(network(adm, "bf16")), exact)
    found = errors(outcome(network(adm, "bf16", **switches)), exact)
    assert 1e-3 < plain["answer"] < 2e-2
    assert found["answer"] <= 1.5 * plain["answer"]
    assert sum(found.values()) <= 1.5 * sum(plain.values())
    assert max(found.values()) <= 2 * max(plain.values())


@pytest.mark.parametrize("switches", FROZEN)
def test_a_frozen_network_answers_alike(switches: dict[str, Any]) -> None:
    theirs, ours = (
        network(frozen=True, **how).eval().requires_grad_(False) for how in ({}, switches)
    )
    with torch.no_grad():
        assert errors(outcome(ours), outcome(theirs))["answer"] <= 1e-5


def test_attention_is_computed_in_every_block_as_asked() -> None:
    for kind, function in ATTENTION.items():
        unet = network(attention=kind).model
        blocks = [part for part in unet.modules() if isinstance(part, UNetBlock)]
        assert len(blocks) == 10
        assert all(block.attention is function for block in blocks)


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("fp32", False)])
def test_gpus_round_to_tf32_where_the_precision_says_so_and_never_for_a_score(
    precision: str, allowed: bool
) -> None:
    def settings() -> tuple[object, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    build_denoiser(replace(TINY, precision=precision))
    assert settings() == (allowed, allowed)
    with exact_products(torch.device("cuda")):
        assert settings() == (False, False)
    assert settings() == (allowed, allowed)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_activations_lie_as_the_layout_says() -> None:
    for layout, expected in {"contiguous": False, "channels_last": True}.items():
        denoiser, seen = network(layout=layout), list[Tensor]()
        for block in (m for m in denoiser.modules() if isinstance(m, UNetBlock)):
            block.register_forward_hook(lambda module, args, answer, seen=seen: seen.append(answer))
        denoiser(*inputs())
        lie = [t.is_contiguous(memory_format=torch.channels_last) for t in seen]
        assert lie == [expected] * 10


# --- recompute ---------------------------------------------------------------------------------


@contextmanager
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The heights of what blocks give, one a computation."""
    compute, heights = UNetBlock.compute, list[int]()

    def counted(block: UNetBlock, x: Tensor, emb: Tensor) -> Tensor:
        scale = 2.0 ** (block.conv0.up - block.conv0.down)
        heights.append(int(x.shape[-1] * scale))  # before: a second computation ends when it may
        return compute(block, x, emb)

    with monkeypatch.context() as patch:
        patch.setattr(UNetBlock, "compute", counted)
        yield heights


@pytest.mark.parametrize("levels", [(), (8,), (16,), (16, 8)])
def test_blocks_of_the_named_levels_are_computed_again(
    levels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with computed(monkeypatch) as heights:
        outcome(network(recompute=levels))
    times = {8: 2 if 8 in levels else 1, 16: 2 if 16 in levels else 1}
    assert {h: heights.count(h) for h in (8, 16)} == {8: 6 * times[8], 16: 4 * times[16]}


def test_nothing_is_computed_again_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    with computed(monkeypatch) as heights, torch.no_grad():
        network(recompute=(16, 8))(*inputs())
    assert len(heights) == 10


def kept(denoiser: Denoiser) -> int:
    """Bytes that a forward pass leaves for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in weights:
            storages[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = denoiser(*inputs())
    assert answer.requires_grad
    return sum(storages.values())


def test_recomputing_keeps_less() -> None:
    everything, coarse, nothing = (kept(network(recompute=r)) for r in ((), (8,), (16, 8)))
    assert nothing < coarse < everything
    assert nothing < everything / 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_recomputed_dropout_drops_the_same(layout: str) -> None:
    theirs = outcome(network(dropout=0.5, layout=layout))
    ours = outcome(network(dropout=0.5, layout=layout, recompute=(16, 8)))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert not torch.equal(theirs["answer"], outcome(network(layout=layout))["answer"])


def test_unknown_resolutions_are_refused_with_the_known_ones() -> None:
    message = r"resolutions of \[8, 16\] to recompute, got \[4, 32\].*performance\.recompute"
    with pytest.raises(ValueError, match=message):
        network(recompute=(32, 8, 4))


# --- compile -----------------------------------------------------------------------------------


def cd_loss(how: dict[str, Any], batches: int = 3) -> list[float]:
    """Losses of consistency steps with dropout, each after an update of the weights."""
    block, n = TINY.students["cd"], TINY.noise
    assert isinstance(block.settings, ConsistencySettings) and block.settings.sync_dropout
    student, teacher = network(dropout=0.5, **how), network(seed=3, frozen=True, **how)
    method, losses = Consistency(student.train(), teacher, block.settings, n), list[float]()
    for nimg in range(batches):
        x, _, labels = inputs()
        torch.manual_seed(nimg)
        loss, _ = method.loss("student", Batch(x, labels, nimg, nimg, 0))
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in student.parameters():
                assert parameter.grad is not None
                parameter -= 1e-5 * parameter.grad
        student.zero_grad()
    return losses


@slow
@pytest.mark.parametrize("switches", COMPILED.values(), ids=COMPILED)
def test_compiled_consistency_distillation_drops_what_the_plain_one_drops(
    switches: dict[str, Any],
) -> None:
    plain = {"layout": switches.get("layout", "contiguous")}  # masks follow the layout
    assert cd_loss(switches) == pytest.approx(cd_loss(plain), rel=1e-4)


@slow
@pytest.mark.parametrize("kind", ["blocks", "network"])
def test_the_target_has_the_dropout_of_the_trained_forward(kind: str) -> None:
    """Compiled with and without a gradient, a network is two programs that must draw alike."""
    denoiser = network(dropout=0.5, compile=kind)
    torch.manual_seed(5)
    learning = denoiser(*inputs()).detach()
    torch.manual_seed(5)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(*inputs()), learning, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(denoiser(*inputs()), learning, rtol=1e-2, atol=1e-2)


def test_a_cpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler for compile: blocks.*try none"):
        network(compile="blocks")
    network(compile="none")


def test_as_many_kinds_of_blocks_may_be_compiled_as_the_largest_network_has() -> None:
    with torch.device("meta"):
        unet = UNet(64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8))
    blocks = sum(isinstance(part, UNetBlock) for part in unet.modules())
    assert blocks * 2 * 3 <= KINDS_OF_BLOCKS, "with gradients and without, for three networks"


# --- CUDA graphs -------------------------------------------------------------------------------


def test_without_a_gpu_a_graphed_function_is_the_function() -> None:
    calls: list[tuple[Tensor, ...]] = []

    def add(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a, b))
        return a + b

    graphed, a, b = Graphed(add), torch.ones(2), torch.full((2,), 2.0)
    with torch.no_grad():
        assert torch.equal(graphed(a, b), torch.full((2,), 3.0))
    assert calls[0][0] is a and calls[0][1] is b and not graphed.graphs


def test_weights_keep_their_names_whatever_is_graphed_or_compiled() -> None:
    names = network().state_dict().keys()
    how = {"cuda_graphs": True, "compile": "network", "recompute": (8,)}
    for frozen in (True, False):
        assert network(frozen=frozen, **how).state_dict().keys() == names


@on_gpu
@pytest.mark.parametrize("kind", ["none", "network"])
def test_a_graph_answers_as_the_network_for_each_shape_and_forgets_nothing(kind: str) -> None:
    how = replace(Performance(), cuda_graphs=True, compile=kind)
    plain = network().cuda().eval().requires_grad_(False)
    graphed = tune(network().cuda().eval().requires_grad_(False), how)
    graphed = accelerate(graphed, how, frozen=True)
    with torch.no_grad():
        places = [[t.cuda() for t in inputs(n)] for n in (4, 2, 4)]
        answers = [graphed(*place) for place in places]
        again = graphed(*[places[0][0] + 1, *places[0][1:]])
        for answer, place in zip(answers, places, strict=True):
            torch.testing.assert_close(answer, plain(*place), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again, answers[0])
    assert len(vars(graphed.model)["forward"].graphs) == 2


@on_gpu
def test_capturing_a_graph_leaves_the_random_stream_where_one_call_would() -> None:
    """Else a resumed run, which captures anew, would draw other dropout masks."""

    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    x, after = torch.zeros(1000, device="cuda"), list[Tensor]()
    graphed = Graphed(noisy)
    with torch.no_grad():
        for _ in range(2):  # captured, then replayed
            torch.manual_seed(0)
            graphed(x)
            after.append(torch.rand(5, device="cuda"))
    assert torch.equal(*after)


@on_gpu
def test_a_call_that_learns_is_not_graphed() -> None:
    graphed = Graphed(torch.square)
    x = torch.ones(3, device="cuda", requires_grad=True)
    graphed(x).sum().backward()
    assert x.grad is not None and not graphed.graphs


# --- updates and averages ----------------------------------------------------------------------


def trained(kind: str, updates: str, steps: int = 5) -> dict[str, Tensor]:
    block = replace(TINY.students["cd"], optimizer=kind, weight_decay=0.01, grad_clip=0.5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    u = Updates(net, block, 1e-2, "fp32", Rank(0, 1, CPU), updates)
    for step in range(steps):
        u.backward(net(torch.randn(16, 4)).square().mean())
        u.step(1000 * (step + 1))
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["adamw", "adam", "radam"])
@pytest.mark.parametrize("updates", ["fused", "foreach"])
def test_updates_are_those_of_the_loop(updates: str, kind: str) -> None:
    found = errors(trained(kind, updates), trained(kind, "loop"))
    assert max(found.values()) <= 1e-5, found
    moved = errors(trained(kind, "loop", 0), trained(kind, "loop"))
    assert min(moved.values()) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999])
def test_averages_in_few_kernels_are_those_of_the_loop(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 5), (), (2, 3, 3, 3)]
    weights, start = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    together, one_by_one = ([t.clone() for t in start] for _ in range(2))
    update_average(together, weights, beta, foreach=True)
    update_average(one_by_one, weights, beta, foreach=False)
    for a, b, w, before in zip(together, one_by_one, weights, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a, beta * before + (1 - beta) * w, rtol=1e-5, atol=1e-6)


# --- shard -------------------------------------------------------------------------------------

QUIET = {
    "data__source": "toy.npz",
    "tracking__dvclive": False,
    "students__cd__phema": {"stds": [0.05], "snapshot_kimg": 0.128},
    "students__cd__kimg": 0.256,
    "students__cd__batch_gpu": 8,
}
# 2 processes that train cd, and are told to stop after 160 images where STOP is set
WORKER = """
import os, signal
from fewstep.cli import main
from fewstep.train import Run

iterate = Run.iterate

def stopping(run):
    iterate(run)
    if run.nimg == 128 and "STOP" in os.environ:  # heard one iteration later
        os.kill(os.getpid(), signal.SIGTERM)

Run.iterate = stopping
main(["train", "cd"])
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    set_up(tmp_path, monkeypatch)
    Path("worker.py").write_text(WORKER)
    return tiny_params(Path(), **QUIET)


def torchrun(shard: bool, ranks: int = 2, stop: bool = False) -> str:
    """What those processes print; the run is whole unless they were to stop."""
    forget_finished("cd")
    tiny_params(Path(), **QUIET, performance={"shard": shard})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **({"STOP": "1"} if stop else {})}
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", "worker.py"],
        env=environ,
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) is stop, output
    assert ("stopped at 0.2 kimg" in output) is stop, output
    return output


def weights() -> dict[str, Tensor]:
    """Of the average that was saved, and of all snapshots."""
    files = [MODELS / "cd" / "model.safetensors", *sorted((SNAPSHOTS / "cd").glob("phema-*"))]
    found = {f"{file.stem} {k}": v for file in files for k, v in read_safetensors(file)[0].items()}
    assert len(files) == 3
    return {k: v.reshape(-1, 3)[:, ::2] if "qkv.bias" in k else v for k, v in found.items()}


@slow
def test_sharded_updates_give_the_weights_of_whole_ones_also_after_a_stop(toy: Params) -> None:
    """A sharded state goes on sharded, bit by bit, or on one process that shards nothing."""
    torchrun(shard=False)
    whole = weights()
    torchrun(shard=True)
    sharded = weights()
    assert max(errors(sharded, whole).values()) <= 1e-5
    torchrun(shard=True, stop=True)
    shutil.copytree("scratch", "kept")
    assert "resuming at 0.2 kimg" in torchrun(shard=True)
    resumed = weights()
    assert all(torch.equal(resumed[k], sharded[k]) for k in sharded)
    shutil.rmtree("scratch")
    shutil.copytree("kept", "scratch")
    assert "resuming at 0.2 kimg" in torchrun(shard=False, ranks=1)
    assert max(errors(weights(), whole).values()) <= 1e-5


def test_one_process_shards_nothing() -> None:
    net = nn.Linear(2, 2)
    u = Updates(net, TINY.students["cd"], 1e-2, "fp32", Rank(0, 1, CPU), "fused", shard=True)
    assert type(u.optimizer) is torch.optim.AdamW and not u.sharded
    u.collect()


# --- all stops of a roll-out -------------------------------------------------------------------


class Recorder(Denoiser):
    """Answers x / 2 plus the class number, and notes what it was asked."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.sigma_data, self.asked = 0.5, list[tuple[Tensor, Tensor, Tensor]]()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        self.asked.append((x.detach(), sigma, labels))
        return self.gain * x + labels.argmax(dim=1).to(x).reshape(-1, 1, 1, 1)


def all_stops(n: int, nimg: int = 0) -> tuple[Recorder, Batch, tuple[Tensor, Tensor, Tensor]]:
    """What `simulate` makes of n images: clean images, labels, steps."""
    settings = TINY.students["dmd2-4"].settings
    assert isinstance(settings, Dmd2Settings)
    student, critic = Recorder(), Critic(Recorder())
    settings = replace(settings, all_stops=True)
    method = Dmd2(student, Recorder(), critic, settings, TINY.noise)
    x = torch.zeros(n, 1, 4, 4)
    batch = Batch(x, torch.eye(10)[torch.arange(n) % 10], nimg, nimg, 0)
    return student, batch, method.simulate(batch, batch.labels)


@pytest.mark.parametrize("n", [4, 8, 32])
def test_every_stop_comes_equally_often(n: int) -> None:
    *_, (clean, labels, k) = all_stops(n)
    assert k.bincount().tolist() == [n // 4] * 4
    assert clean.shape == (n, 1, 4, 4) and labels.shape == (n, 10)


def test_stops_that_do_not_divide_the_batch_all_come() -> None:
    counts = torch.stack([all_stops(7, nimg)[2][2].bincount(minlength=4) for nimg in range(50)])
    assert bool((counts.sum(dim=1) == 7).all())
    assert int(counts.min()) >= 1 and int(counts.max()) == 2


def test_images_of_a_roll_out_cost_less_than_a_call_each() -> None:
    student, *_ = all_stops(32)
    assert sum(len(x) for x, *_ in student.asked) == 32 * 3 / 4


def test_images_are_those_of_the_sampler_cut_short_with_the_labels_of_their_roll_out() -> None:
    _, batch, (clean, labels, k) = all_stops(32)
    fresh = Batch(batch.images, batch.labels, batch.nimg, batch.step_nimg, batch.seed)
    noises = [fresh.normal_like(fresh.images[:8]).double() for _ in range(4)]
    sigmas = noise.karras_sigmas(4, TINY.noise.sigma_min, TINY.noise.sigma_max, TINY.noise.rho)
    student, rollouts = Recorder().double(), batch.labels[:8]
    stops = [sigmas[0] * noises[0]]
    for stop in range(1, 4):
        later = iter(noises[1:]).__next__
        stops.append(sample_renoise(student, noises[0], rollouts, sigmas[:stop], later))
    found = set[tuple[int, int]]()
    for image, label, stop in zip(clean, labels, k.tolist(), strict=True):
        distance = (stops[stop] - image).flatten(1).abs().amax(dim=1)
        rollout = int(distance.argmin())
        torch.testing.assert_close(image.double(), stops[stop][rollout], rtol=1e-5, atol=1e-5)
        assert torch.equal(label, rollouts[rollout])
        found.add((stop, rollout))
    assert len(found) == 32, "each stop of each roll-out once"


def test_what_is_drawn_follows_from_the_place_on_the_clock() -> None:
    (_, _, a), (_, _, again), (_, _, later) = all_stops(8), all_stops(8), all_stops(8, 8)
    assert all(map(torch.equal, a, again))
    assert not torch.equal(a[0], later[0])


# --- reading ahead -----------------------------------------------------------------------------


def test_places_are_read_in_order_and_once_each() -> None:
    read: list[int] = []

    def square(place: int) -> int:
        read.append(place)
        return place * place

    ahead = Prefetch(square)
    assert [ahead(place, place + 1) for place in range(5)] == [0, 1, 4, 9, 16]
    ahead.thread.shutdown()
    assert read == [0, 1, 2, 3, 4, 5]


def test_nothing_is_read_past_the_end() -> None:
    read: list[int] = []
    ahead = Prefetch[None](read.append)
    ahead(0, 1)
    ahead(1, None)
    ahead.thread.shutdown()
    assert read == [0, 1]


def test_what_follows_is_read_while_this_is_used() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read(place: int) -> int:
        if place == 1:
            begun.set()
            assert go_on.wait(10)
        return place

    ahead = Prefetch(read)
    assert ahead(0, 1) == 0
    assert begun.wait(10), "1 is being read, though nobody asked for it"
    go_on.set()
    assert ahead(1, 2) == 1


def test_a_run_that_goes_on_elsewhere_reads_there() -> None:
    ahead = Prefetch(lambda place: place)
    assert ahead(0, 32) == 0
    assert ahead(320, 352) == 320
    assert ahead(352, 384) == 352


def test_what_reading_raised_comes_through_when_it_is_asked_for() -> None:
    def read(place: int) -> int:
        if place == 2:
            raise ValueError("need a sound LMDB")
        return place

    ahead = Prefetch(read)
    assert [ahead(0, 1), ahead(1, 2)] == [0, 1]
    with pytest.raises(ValueError, match="need a sound LMDB"):
        ahead(2, 3)


def test_the_grid_of_edges_is_built_once_for_each_number_of_edges() -> None:
    block = TINY.students["cd"]
    assert isinstance(block.settings, ConsistencySettings)
    method = Consistency(network(), network(), block.settings, TINY.noise)
    first: Grid = method.grid(0.0)
    assert method.grid(0.0) is first
    assert method.grid(1.0) is not first
