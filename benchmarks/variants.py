"""The ways of computing that are compared: params with other `performance`, or `precision`."""

from dataclasses import replace
from typing import Any, Literal

from fewstep.params import Params, Performance

PLAIN: dict[str, Any] = {
    "layout": "contiguous",
    "attention": "plain",
    "norm": "plain",
    "updates": "loop",
    "compile": "none",
    "cuda_graphs": False,
    "recompute": (),
}
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")  # tf32 is the whole process's
SWITCHES: dict[str, dict[str, Any]] = {
    "layout": {"layout": "channels_last"},
    "attention": {"attention": "fused"},
    "norm": {"layout": "channels_last", "norm": "fused"},  # in that layout alone
    "foreach": {"updates": "foreach"},
    "updates": {"updates": "fused"},
    "compile-blocks": {"compile": "blocks"},
    "compile-network": {"compile": "network"},
    "cuda-graphs": {"cuda_graphs": True},
    "cudnn-benchmark": {"cudnn_benchmark": True},
}


def known(params: Params) -> dict[str, Params]:
    """`plain`; `fast`, the params' own; plain with one switch; fast with one more, as fast+NAME.

    `recompute` computes all activations of the largest resolution again; fp32, bf16 and fp16 are
    switches too, and `fast+no-compile` is fast without what takes minutes to prepare.
    """
    switches = {**SWITCHES, "recompute": {"recompute": (params.data.resolution,)}}
    own = vars(params.performance)
    keys = {"plain": PLAIN, "fast": own}
    keys |= {name: {**PLAIN, **switch} for name, switch in switches.items()}
    keys |= {f"fast+{name}": {**own, **switch} for name, switch in switches.items()}
    keys["fast+no-compile"] = {**own, "compile": "none"}
    found = {name: replace(params, performance=Performance(**k)) for name, k in keys.items()}
    found |= {name: replace(found["plain"], precision=name) for name in PRECISIONS}
    return found | {f"fast+{name}": replace(params, precision=name) for name in PRECISIONS}


def chosen(names: list[str], params: Params) -> dict[str, Params]:
    """The variants of those names.

    Raises:
        ValueError: an unknown name, two names for one thing, or tf32 beside another precision.
    """
    every = known(params)
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"need variants of {', '.join(every)}, got {', '.join(unknown)}")
    found = {name: every[name] for name in names}
    for name, how in found.items():
        if same := [other for other in found if other != name and found[other] == how]:
            raise ValueError(f"need variants that differ, got {name} and {same[0]}")
    if len(precisions := {how.precision for how in found.values()}) > 1 and "tf32" in precisions:
        raise ValueError(
            "need variants of tf32 alone where params have it, since it is a setting of the whole "
            f"process, got {', '.join(sorted(precisions))} (params.yaml: precision)"
        )
    return found
