"""The network and the denoiser that params.yaml describes."""

from importlib import import_module

from fewstep.networks import names
from fewstep.networks.compute import add_in_order, allow_tf32, try_cudnns_kernels, tune
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.protocol import Architecture, Network
from fewstep.params.described import Described


def network_class(name: str) -> type[Network]:
    """The `NETWORK` of the file fewstep/networks/<name>.py.

    Raises:
        ValueError: no such network.
    """
    if name not in names():
        raise ValueError(f"need {' or '.join(names())}, got {name!r} (params.yaml: network.type)")
    return import_module(f"fewstep.networks.{name}").NETWORK


def build_denoiser(
    params: Described,
    dropout: float = 0.0,
    label_dropout: float = 0.0,
    dropout_resolutions: tuple[int, ...] | None = None,
) -> Denoiser:
    """A denoiser of params.network with random weights, in train mode, on the CPU."""
    allow_tf32(params.precision == "tf32")
    try_cudnns_kernels(params.performance.cudnn_benchmark)
    if params.performance.deterministic:
        add_in_order()
    n, d = params.network, params.data
    architecture = Architecture(
        resolution=d.resolution,
        channels=d.channels,
        classes=d.classes,
        model_channels=n.model_channels,
        channel_mult=n.channel_mult,
        num_blocks=n.num_blocks,
        attn_resolutions=n.attn_resolutions,
        dropout=dropout,
        label_dropout=label_dropout,
        dropout_resolutions=dropout_resolutions,
    )
    network = network_class(n.type)(architecture)
    return tune(Denoiser(network, n.sigma_data, params.precision), params.performance)
