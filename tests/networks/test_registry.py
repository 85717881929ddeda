"""Networks are found by the name of their file, and built as params say."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep import networks
from fewstep.networks.adm import ADM
from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.edm2 import EDM2
from fewstep.networks.ncsnpp import NCSNpp
from fewstep.networks.registry import build_denoiser, network_class
from fewstep.params import load_params
from places import CONFIG

TINY = load_params(CONFIG / "tiny.yaml")


def test_every_file_that_declares_a_network_is_found_by_its_name() -> None:
    assert networks.names() == ("adm", "ddpmpp", "edm2", "ncsnpp")
    found = tuple(map(network_class, networks.names()))
    assert found == (ADM, DDPMpp, EDM2, NCSNpp)


def test_a_network_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from fewstep.networks.adm import ADM\n\n\nclass Wide(ADM): ...\n\n\nNETWORK = Wide\n"
    (tmp_path / "wide.py").write_text(code)
    monkeypatch.setattr(networks, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(networks, "__path__", [str(tmp_path)])
    networks.names.cache_clear()
    try:
        wide = build_denoiser(replace(TINY, network=replace(TINY.network, type="wide"))).model
    finally:
        networks.names.cache_clear()
        sys.modules.pop("fewstep.networks.wide", None)
    assert type(wide).__name__ == "Wide" and isinstance(wide, ADM)


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"need adm or .* or ncsnpp, got 'edm9' .*network\.type"):
        network_class("edm9")


def test_names_are_known_without_torch() -> None:
    """params.yaml is checked by commands that must answer at once."""
    code = "import sys; from fewstep.networks import names; names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("kind", networks.names())
def test_a_denoiser_is_what_params_say(kind: str) -> None:
    n, d = replace(TINY.network, type=kind, sigma_data=0.25), TINY.data
    denoiser = build_denoiser(replace(TINY, network=n, precision="bf16"), 0.5, 0.25, (8,))
    network = denoiser.model
    assert isinstance(network, network_class(kind)) and network.training
    assert (denoiser.sigma_data, denoiser.dtype) == (0.25, torch.bfloat16)
    assert network.label_dropout == 0.25
    assert network.bottleneck_channels == n.model_channels * n.channel_mult[-1]
    assert network.bottleneck_resolution == d.resolution >> (len(n.channel_mult) - 1)
    rates = {(block.resolution, getattr(block, "dropout", None)) for block in network.blocks()}
    assert rates == {(16, 0.0), (8, 0.5)}


def test_nothing_is_done_after_a_step_of_these_networks() -> None:
    network = build_denoiser(TINY).model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.after_step()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
