"""Weights of feature networks: exactly the file that a result names, read without executing it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fewstep.files import sha256_file

Network = TypeVar("Network", bound=nn.Module)


def load_network(
    path: Path, sha256: str, url: str, build: Callable[[dict[str, Tensor]], Network]
) -> Network:
    """The network that `build` makes of the state dict in params.metric.weights, frozen.

    Args:
        url: where to get the right file, for messages.

    Raises:
        ValueError: no such file, another sha256, a pickle (NVIDIA's .pkl, which would have to be
            executed), or the weights of another network.
    """
    state = read_weights(path, sha256, url, "metric.weights")
    try:
        return build(state).eval().requires_grad_(False)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"need the weights of {url}, got other names or shapes in {path} "
            "(params.yaml: metric.weights)"
        ) from error


def read_weights(path: Path, sha256: str, source: str, key: str) -> dict[str, Tensor]:
    """The state dict in a `torch.save` or safetensors file, on the CPU.

    Args:
        sha256: of the file's bytes, 64 hex digits.
        source: where to get the right file, for messages.
        key: of params.yaml, for messages.

    Raises:
        ValueError: no such file, another sha256, or more in it than tensors, as in a pickle of
            a whole network.
    """
    found = sha256_file(path) if path.is_file() else "no file"
    if found != sha256.lower():
        raise ValueError(
            f"need sha256 {sha256} of {path}, got {found} (from {source}; params.yaml: {key})"
        )
    try:
        # by content: a file in the download cache has no suffix
        with open(path, "rb") as file:
            safetensors = file.read(9)[8:] == b"{"  # after the length of the header
        state = load_file(path) if safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and struct each raise their own
        raise ValueError(
            f"need {source}, got {path}, which contains more than tensors, or is damaged, and was "
            f"not loaded (params.yaml: {key})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"need a state dict from {source}, got something else in {path} (params.yaml: {key})"
        )
    return state


def fold_norm(module: nn.Module, conv: str, norm: str) -> None:
    """Fold the batch norm called `norm` into the convolution called `conv`, in place.

    This halves the memory traffic, and nearly halves the time on a CPU.
    """
    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())
