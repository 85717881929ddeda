"""EDM2's network: the paper's equations, magnitudes, and what each step leaves of the weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

import edm2_plain as plain
from experiment import architecture_of
from fewstep.networks import magnitude
from fewstep.networks.compute import tune
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.edm2 import EDM2
from fewstep.networks.protocol import Architecture
from fewstep.params import Performance
from fewstep.theory.losses import uncertainty_loss

RECORDED = np.load(plain.FILE)
SMALL = architecture_of(plain)


def ours(name: str) -> str:
    return name.replace("unet.", "model.").replace("logvar_", "model.logvar.")


def denoiser(precision: str = "fp32", **performance: str) -> Denoiser:
    """The small network with the weights of the recorded vectors."""
    network = Denoiser(EDM2(SMALL), plain.SIGMA_DATA, precision).eval()
    weights = {ours(name): torch.from_numpy(w) for name, w in plain.weights().items()}
    network.load_state_dict(weights)
    return tune(network, Performance(**performance))  # pyright: ignore[reportArgumentType]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, sigma, labels = (torch.from_numpy(part).float() for part in plain.inputs())
    return x, sigma, labels


def magnitudes(network: EDM2, n: int = 8) -> dict[str, float]:
    """Root mean square of what each layer gives for standard normal images and random labels."""
    found: dict[str, float] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, out, name=name: found.update(
                {name: float(out.detach().square().mean().sqrt())}
            )
        )
        for name, module in network.named_modules()
    ]
    a, generator = network.architecture, torch.Generator().manual_seed(0)
    x = torch.randn(n, a.channels, a.resolution, a.resolution, generator=generator)
    with torch.no_grad():
        network(x, torch.linspace(-1.5, 1.1, n), torch.eye(a.classes)[torch.arange(n) % a.classes])
    for handle in handles:
        handle.remove()
    return found


# --- parity --------------------------------------------------------------------------------------


def test_the_recorded_vectors_are_those_of_the_plain_equations() -> None:
    for name, value in plain.vectors().items():
        np.testing.assert_allclose(value, RECORDED[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_images_bottleneck_and_uncertainty_are_the_recorded_ones(
    layout: str, attention: str
) -> None:
    network, (x, sigma, labels) = denoiser(layout=layout, attention=attention), inputs()
    with torch.no_grad():
        found = {
            "D_x": network(x, sigma, labels),
            "bottleneck": network.bottleneck(x, sigma, labels),
            "u": network.log_variance(sigma),
        }
    for name, value in found.items():
        assert value is not None
        torch.testing.assert_close(
            value, torch.from_numpy(RECORDED[name]), rtol=1e-4, atol=2e-5, msg=name
        )


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.006)])
def test_half_precision_rounds_as_it_must(precision: str, tolerance: float) -> None:
    network, (x, sigma, labels) = denoiser(precision), inputs()
    with torch.no_grad():
        found, expected = network(x, sigma, labels), torch.from_numpy(RECORDED["D_x"])
    error = (found - expected).square().mean(dim=(1, 2, 3)).sqrt()
    assert bool((error < tolerance * expected.square().mean(dim=(1, 2, 3)).sqrt()).all())


def test_weights_have_the_names_and_shapes_of_published_checkpoints() -> None:
    state = Denoiser(EDM2(SMALL), 0.5, "fp32").state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == {
        ours(name): shape for name, shape in plain.shapes().items()
    }


def test_the_small_model_of_imagenet_has_the_published_size_and_bottleneck() -> None:
    with torch.device("meta"):
        network = EDM2(Architecture(64, 3, 1000, 192, (1, 2, 3, 4), 3, (16, 8)))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(280.2, abs=0.05)
    assert (network.bottleneck_channels, network.bottleneck_resolution) == (768, 8)


# --- magnitudes ----------------------------------------------------------------------------------


def test_the_parts_preserve_magnitudes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, n, 16, 16, generator=generator) for n in (32, 96))
    c = torch.randn(8, 32, 16, 16, generator=generator)
    both = magnitude.mp_cat(a, b, 0.3)
    torch.manual_seed(0)
    parts = {
        "silu": magnitude.mp_silu(a),
        "sum": magnitude.mp_sum(a, c, 0.3),
        "cat": both,
        "norm": magnitude.normalise(7 * a, 1),
        "fourier": magnitude.Fourier(512)(torch.randn(256)),
        "linear": magnitude.MPConv(96, 64)(torch.randn(512, 96)),
        "1x1": magnitude.MPConv(96, 64, 1)(b),
    }
    for name, part in parts.items():
        assert float(part.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.04), name
    shares = [float(part.square().sum()) for part in both.split([32, 96], dim=1)]
    assert shares[1] / shares[0] == pytest.approx((0.3 / 0.7) ** 2, rel=0.02)


def test_a_new_network_keeps_magnitudes_near_1_and_answers_0() -> None:
    torch.manual_seed(0)
    found = magnitudes(EDM2(Architecture(32, 3, 10, 64, (1, 2, 2), 2, (16, 8))))
    assert found["out_conv"] == 0
    blocks = {name: value for name, value in found.items() if name.endswith(tuple("0123"))}
    assert len(blocks) > 20
    assert all(0.5 < value < 1.5 for name, value in blocks.items() if "emb_" not in name), blocks


def test_the_magnitude_of_weights_does_not_matter_and_gradients_are_orthogonal_to_them() -> None:
    layer, x = magnitude.MPConv(16, 8, 3), torch.randn(2, 16, 8, 8)
    answer = layer(x)
    answer.square().sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    with torch.no_grad():
        along = (gradient * layer.weight).flatten(1).sum(dim=1)
        assert float(along.abs().max()) < 1e-3 * float(gradient.norm())
        layer.weight.mul_(30.0)
        torch.testing.assert_close(layer(x), answer, rtol=1e-3, atol=1e-3)


def test_after_a_step_each_outputs_weights_have_magnitude_1() -> None:
    network = EDM2(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    gains = {n: p.clone() for n, p in network.named_parameters() if n.endswith("gain")}
    network.after_step()
    for name, parameter in network.named_parameters():
        if name in gains:
            assert torch.equal(parameter, gains[name]), name
        else:
            size = parameter.detach().flatten(1).square().mean(dim=1).sqrt()
            torch.testing.assert_close(size, torch.ones_like(size), rtol=2e-3, atol=0, msg=name)


def test_gains_begin_at_0() -> None:
    network = EDM2(SMALL)
    assert all(not p.detach().any() for n, p in network.named_parameters() if n.endswith("gain"))


# --- gradients, labels, dropout ------------------------------------------------------------------


def test_every_parameter_gets_a_gradient() -> None:
    network, (x, sigma, labels) = denoiser().train(), inputs()
    u = network.log_variance(sigma)
    assert u is not None
    error = (network(x, sigma, labels) - 1).square().flatten(1).mean(dim=1)
    uncertainty_loss(error, u).mean().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in ((), (16, 8)):
        network, (x, sigma, labels) = denoiser(recompute=recompute).train(), inputs()  # pyright: ignore
        network(x, sigma, labels).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    one, other = gradients
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_label_dropout_and_dropout_act_in_train_mode_only() -> None:
    torch.manual_seed(0)
    architecture = Architecture(16, 1, 5, 32, (1, 2), 1, (), dropout=0.5, label_dropout=0.5)
    network = Denoiser(EDM2(architecture), 0.5, "fp32")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3
    x, sigma, labels = inputs()
    assert not torch.equal(network(x, sigma, labels), network(x, sigma, labels))
    network.eval()
    assert torch.equal(network(x, sigma, labels), network(x, sigma, labels))


def test_large_activations_are_clipped() -> None:
    network = denoiser().model
    assert isinstance(network, EDM2)
    block = network.dec["16x16_block2"]
    out = block(1e4 * torch.ones(1, 64, 16, 16), torch.ones(1, 128))
    assert float(out.detach().abs().max()) == 256.0


# --- the uncertainty -----------------------------------------------------------------------------


def test_the_uncertainty_loss_is_least_at_the_logarithm_of_the_loss() -> None:
    loss, u = torch.tensor([0.01, 0.5, 3.0]), torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(uncertainty_loss(loss, u).sum(), u)
    torch.testing.assert_close(gradient, 1 - loss)
    at_best = loss.log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertainty_loss(loss, at_best).sum(), at_best)
    torch.testing.assert_close(gradient, torch.zeros(3), rtol=0, atol=1e-6)
