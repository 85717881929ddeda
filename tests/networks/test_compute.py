"""How networks are computed changes no result: every choice against the plain one."""

import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CLASSES, EDM
from fewstep.data.batch import Batch
from fewstep.methods.consistency import Consistency, Settings
from fewstep.metrics.features import exact_products
from fewstep.networks.adm import ADM
from fewstep.networks.compute import (
    ATTENTION,
    KINDS_OF_BLOCKS,
    Graphed,
    _prepare_compiler,
    accelerate,
    tune,
)
from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.edm2 import EDM2Block
from fewstep.networks.layers import UNetBlock, laid_out_as
from fewstep.networks.ncsnpp import NCSNpp
from fewstep.networks.protocol import Architecture
from fewstep.networks.registry import build_denoiser
from fewstep.networks.unet import UNet
from fewstep.params import Performance, load_params
from places import CONFIG, ROOT

TINY = load_params(CONFIG / "tiny.yaml")
CPU = torch.device("cpu")
PLAIN = Performance("contiguous", "plain", "plain", "loop")
slow = pytest.mark.slow
on_gpu = pytest.mark.cuda
INFO = Path("/proc/cpuinfo")
AVX512_BF16 = INFO.exists() and "avx512_bf16" in INFO.read_text()

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
    "compile: blocks, fused attention": {"compile": "blocks", "attention": "fused"},
    "compile: network, the rest too": {**SWITCHES["all but compile"], "compile": "network"},
}
FROZEN = [
    *(pytest.param(switches, id=name) for name, switches in SWITCHES.items()),
    *(pytest.param(switches, id=name, marks=slow) for name, switches in COMPILED.items()),
]
# each with all networks, but for what takes a minute to compile
KINDS = (ADM, DDPMpp, NCSNpp)
ALL = [
    *(
        pytest.param(switches, kind, id=f"{name}, {kind.__name__}")
        for name, switches in SWITCHES.items()
        for kind in KINDS
    ),
    *(
        pytest.param(COMPILED[name], kind, id=f"{name}, {kind.__name__}", marks=slow)
        for name, kinds in zip(COMPILED, ((ADM, NCSNpp), (ADM,), (DDPMpp, NCSNpp)), strict=True)
        for kind in kinds
    ),
]


def network(
    kind: type[UNet] = ADM,
    precision: str = "fp32",
    dropout: float = 0.0,
    frozen: bool = False,
    seed: int = 0,
    **switches: Any,  # noqa: ANN401
) -> Denoiser:
    """A denoiser of 16x16 images with attention at 8x8, whose zero-initialised layers are not 0."""
    torch.manual_seed(seed)
    unet = kind(Architecture(16, 1, CLASSES, 32, (1, 2), 1, (8,), dropout))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    how = replace(PLAIN, **switches)
    return accelerate(tune(Denoiser(unet, 0.5, precision), how), how, frozen)


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 16, 16, generator=generator)
    return x, torch.linspace(0.1, 5, n), torch.eye(CLASSES)[torch.arange(n) % CLASSES]


def outcome(denoiser: Denoiser) -> dict[str, Tensor]:
    """The answer to `inputs` and, where it learns, each gradient; dropout always draws the same.

    Computed where the denoiser is.

    The bias of attention's keys is left out: softmax does not see it, its gradient is rounding.
    """
    torch.manual_seed(2)
    device = next(denoiser.parameters()).device
    answer = denoiser(*(t.to(device) for t in inputs()))
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


@pytest.mark.parametrize(("switches", "kind"), ALL)
def test_answer_and_gradients_are_the_plain_ones(
    switches: dict[str, Any], kind: type[UNet]
) -> None:
    found = errors(outcome(network(kind, **switches)), outcome(network(kind)))
    assert len(found) > 60
    assert max(found.values()) <= 1e-5, found


def on_cuda(switches: dict[str, Any], precision: str = "fp32", frozen: bool = False) -> Denoiser:
    """The network on a GPU, compiled there if asked."""
    how = replace(PLAIN, **switches)
    denoiser = tune(network(precision=precision), how).cuda()
    if frozen:
        denoiser = denoiser.eval().requires_grad_(False)
    return accelerate(denoiser, how, frozen)


@on_gpu
@pytest.mark.parametrize("switches", FROZEN)
def test_on_a_gpu_every_choice_gives_the_answer_and_gradients_of_a_cpu(
    switches: dict[str, Any],
) -> None:
    with exact_products(torch.device("cuda")):
        ours = {k: v.cpu() for k, v in outcome(on_cuda(switches)).items()}
        frozen = outcome(on_cuda(switches, frozen=True))["answer"].cpu()
    theirs = outcome(network())
    found = errors(ours, theirs)
    assert max(found.values()) <= 1e-4, found
    assert errors({"answer": frozen}, {"answer": theirs["answer"]})["answer"] <= 1e-4


@on_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["none", pytest.param("blocks", marks=slow)])
def test_on_a_gpu_half_precision_is_near_fp32(precision: str, kind: str) -> None:
    exact = outcome(network())
    switches = {**SWITCHES["all but compile"], "compile": kind}
    ours = {k: v.cpu() for k, v in outcome(on_cuda(switches, precision)).items()}
    found = errors(ours, exact)
    assert found["answer"] <= 2e-2, found


@pytest.mark.parametrize(("switches", "kind"), ALL)
def test_in_bf16_they_are_as_near_to_fp32_as_the_plain_ones(
    switches: dict[str, Any], kind: type[UNet]
) -> None:
    exact = outcome(network(kind))
    plain = errors(outcome(network(kind, "bf16")), exact)
    ours = outcome(network(kind, "bf16", **switches))
    wrong = "compile" in switches and "attention" not in switches and AVX512_BF16
    if wrong and any(v.isnan().any() for v in ours.values()):
        pytest.xfail("PyTorch 2.13 compiles NaN for such CPUs; `fewstep check` says so")
    found = errors(ours, exact)
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


def test_cudnn_tries_its_kernels_only_where_params_ask_and_never_for_a_score() -> None:
    for wanted in (True, False):
        build_denoiser(replace(TINY, performance=Performance(cudnn_benchmark=wanted)))
        assert torch.backends.cudnn.benchmark is wanted
        with exact_products(torch.device("cuda")):
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark is wanted


def test_gpus_add_in_a_fixed_order_only_where_params_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own stays
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    build_denoiser(TINY)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        build_denoiser(replace(TINY, performance=Performance(deterministic=True)))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_activations_lie_as_the_layout_says(device: str) -> None:
    for layout, expected in {"contiguous": False, "channels_last": True}.items():
        denoiser, seen = network(layout=layout).to(device), list[Tensor]()
        for block in (m for m in denoiser.modules() if isinstance(m, UNetBlock)):
            block.register_forward_hook(lambda module, args, answer, seen=seen: seen.append(answer))
        denoiser(*(t.to(device) for t in inputs()))
        lie = [t.is_contiguous(memory_format=torch.channels_last) for t in seen]
        assert lie == [expected] * 10


def test_what_a_norm_reordered_is_put_in_order_again() -> None:
    """As after PyTorch's GroupNorm on GPUs, which returns contiguous tensors."""
    x = torch.randn(2, 8, 4, 4)
    for format in (torch.channels_last, torch.contiguous_format):
        ordered = laid_out_as(x.contiguous(memory_format=format), x + 1)
        assert ordered.is_contiguous(memory_format=format) and torch.equal(ordered, x + 1)


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
    block = TINY.students["cd"]
    assert isinstance(block.settings, Settings) and block.settings.sync_dropout
    student, teacher = network(dropout=0.5, **how), network(seed=3, frozen=True, **how)
    method, losses = Consistency(student.train(), teacher, block.settings, EDM), list[float]()
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


def test_what_only_has_shapes_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is made on machines without a compiler, and in seconds."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    network = build_denoiser(TINY).to("meta")
    accelerate(network, Performance(compile="blocks", cuda_graphs=True), frozen=True)
    assert all(block._compiled_call_impl is None for block in network.model.blocks())


def test_a_gpu_without_what_triton_builds_with_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match="need a C compiler for compile: blocks on a GPU"):
        _prepare_compiler("blocks", on_cpu=False)
    monkeypatch.setenv("CC", "icx")
    with pytest.raises(ValueError, match=r"need Python's headers, .*Python\.h, for compile"):
        _prepare_compiler("blocks", on_cpu=False)
    (tmp_path / "Python.h").touch()
    _prepare_compiler("blocks", on_cpu=False)


def test_the_image_for_gpus_has_a_compiler() -> None:
    assert re.search(r"apt-get install [^&]*\bg\+\+", (ROOT / "Dockerfile").read_text())


def test_as_many_kinds_of_blocks_may_be_compiled_as_the_largest_network_has() -> None:
    with torch.device("meta"):
        unet = ADM(Architecture(64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8)))
    blocks = sum(isinstance(part, UNetBlock) for part in unet.modules())
    assert blocks * 2 * 4 <= KINDS_OF_BLOCKS, "with gradients and without, for four networks"
    _prepare_compiler("blocks", on_cpu=True)
    config: Any = torch._dynamo.config  # pyright: ignore
    assert config.recompile_limit == config.accumulated_recompile_limit == KINDS_OF_BLOCKS
    assert not config.optimize_ddp, "which refuses blocks that are computed again"


# --- CUDA graphs -------------------------------------------------------------------------------


def test_without_a_gpu_a_graphed_function_is_the_function() -> None:
    calls: list[tuple[Tensor, ...]] = []

    def add(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a, b))
        return a + b

    graphed, a, b = Graphed(add, nn.Identity()), torch.ones(2), torch.full((2,), 2.0)
    with torch.no_grad():
        assert torch.equal(graphed(a, b), torch.full((2,), 3.0))
    assert calls[0][0] is a and calls[0][1] is b and not graphed.graphs


def test_weights_keep_their_names_whatever_is_graphed_or_compiled() -> None:
    names = network().state_dict().keys()
    how = {"cuda_graphs": True, "compile": "network", "recompute": (8,)}
    for frozen in (True, False):
        assert network(frozen=frozen, **how).state_dict().keys() == names


class OnGpu:
    """What `Graphed` asks of a CUDA tensor, of one value."""

    is_cuda, shape, dtype = True, torch.Size([1]), torch.float32

    def copy_(self, other: "OnGpu") -> None: ...

    def clone(self) -> "OnGpu":
        return self

    def replay(self) -> None: ...


def test_a_graph_is_captured_for_each_mode_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen network in train mode draws dropout; its graph of eval mode cannot."""
    denoiser, modes, place = network(frozen=True, cuda_graphs=True), list[bool](), OnGpu()

    def capture(graphed: Graphed, inputs: Any) -> Any:  # noqa: ANN401
        modes.append(denoiser.model.training)
        return place, inputs, place

    monkeypatch.setattr(Graphed, "capture", capture)
    forward: Any = denoiser.model.forward
    with torch.no_grad():
        for training in (True, False, True, False):
            denoiser.train(training)
            forward(place)
    assert modes == [True, False]
    assert len(forward.graphs) == 2


def test_a_capture_survives_threads_that_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads ahead pins its batches, which would end a capture of mode `global`."""
    seen: list[str] = []

    def graph(captured: object, capture_error_mode: str = "global") -> AbstractContextManager[None]:
        seen.append(capture_error_mode)
        return nullcontext()

    nothing = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda aside: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: OnGpu())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(OnGpu, "device", "cuda", raising=False)
    place: Any = OnGpu()
    with torch.no_grad():
        Graphed(lambda x: x, nn.Identity())(place)
    assert seen == ["thread_local"]


@on_gpu
@pytest.mark.parametrize("kind", ["none", pytest.param("network", marks=slow)])
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
    graphed = Graphed(noisy, nn.Identity())
    with torch.no_grad():
        for _ in range(2):  # captured, then replayed
            torch.manual_seed(0)
            graphed(x)
            after.append(torch.rand(5, device="cuda"))
    assert torch.equal(*after)


@on_gpu
def test_a_call_that_learns_is_not_graphed() -> None:
    graphed = Graphed(torch.square, nn.Identity())
    x = torch.ones(3, device="cuda", requires_grad=True)
    graphed(x).sum().backward()
    assert x.grad is not None and not graphed.graphs


@pytest.mark.parametrize("kind", ["adm", "edm2"])
def test_a_block_compiles_to_a_single_graph(kind: str) -> None:
    """Where torch.compile meets what it cannot trace it cuts the graph in two, and says nothing."""
    shape = {"attention": True, "down": True}
    adm = UNetBlock(8, 32, 64, 128, ADM.style, **shape)
    block = adm if kind == "adm" else EDM2Block(8, 32, 64, 128, **shape)
    x, emb = torch.randn(1, 32, 16, 16), torch.randn(1, 128)
    expected = block(x, emb)
    block.compile(dynamic=False, backend="eager", fullgraph=True)
    torch.testing.assert_close(block(x, emb), expected)
