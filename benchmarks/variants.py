"""The ways of computing that are compared: each a set of `performance` keys of params.yaml."""

from typing import Any

from fewstep.params import Params, Performance

PLAIN: dict[str, Any] = {
    "layout": "contiguous",
    "attention": "plain",
    "updates": "loop",
    "compile": "none",
    "cuda_graphs": False,
    "recompute": (),
    "shard": False,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "layout": {"layout": "channels_last"},
    "attention": {"attention": "fused"},
    "foreach": {"updates": "foreach"},
    "updates": {"updates": "fused"},
    "compile-blocks": {"compile": "blocks"},
    "compile-network": {"compile": "network"},
    "cuda-graphs": {"cuda_graphs": True},
}


def known(params: Params) -> dict[str, Performance]:
    """`plain`; `fast`, the params' own; plain with one switch; fast with one more, as fast+NAME.

    `recompute` computes all activations of the largest resolution again.
    """
    own = vars(params.performance)
    switches = {**SWITCHES, "recompute": {"recompute": (params.data.resolution,)}}
    found = {"plain": Performance(**PLAIN), "fast": params.performance}
    found |= {name: Performance(**{**PLAIN, **switch}) for name, switch in switches.items()}
    return found | {f"fast+{n}": Performance(**{**own, **s}) for n, s in switches.items()}


def chosen(names: list[str], params: Params) -> dict[str, Performance]:
    """The variants of those names.

    Raises:
        ValueError: an unknown name.
    """
    every = known(params)
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"need variants of {', '.join(every)}, got {', '.join(unknown)}")
    return {name: every[name] for name in names}
