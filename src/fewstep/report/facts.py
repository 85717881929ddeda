"""What the page says of the run as a whole and of each row: protocol, hashes, machines, versions.

What provenance.py finds out once for a result is put together here for all of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fewstep.files import read_json
from fewstep.params import Params, digest
from fewstep.paths import SAMPLES, SCORES
from fewstep.report.frames import train_seconds
from fewstep.report.provenance import recall, this_run
from fewstep.report.text import Row
from fewstep.sampling.batches import seed_ranges

About = Mapping[str, Any]


def experiment(params: Params) -> dict[str, Any]:
    """The params that results depend on: neither the device nor where trainings are shown."""
    return {k: v for k, v in params.as_dict().items() if k not in ("device", "tracking", "sweeps")}


def provenance(params: Params, names: Iterable[str]) -> dict[str, Any]:
    """Of this table, each row's images and each score: commit, params, machine, versions, time."""
    return {
        "params_sha256": digest(experiment(params)),
        "results": this_run(),
        "samples": {name: recall(f"samples/{name}", SAMPLES / f"{name}.npz") for name in names},
        "scores": {name: recall(name, SCORES / f"{name}.json") for name in names},
    }


def facts(params: Params, about: About, row: Row, runs: Mapping[str, Any]) -> dict[str, str]:
    """What the page says of all rows at once.

    Args:
        about: artifacts/ref-stats.json.
        row: any of them.
        runs: what `provenance` gave.
    """
    g, now = params.generate, runs["results"]
    machine = now["hardware"]
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    most = max((seed_ranges(g, row) for row in params.rows.values()), key=len)
    ranges = ", ".join(f"{r.start:,} to {r.stop - 1:,}" for r in most)
    return {
        "seeds": f"{ranges}; image i is drawn from its seed alone",
        "classes": {"balanced": "seed modulo classes", "random": "drawn from the seed"}[g.labels],
        "rounding": row["rounding"],
        "precision": params.precision,
        "detector": f"{about['detector']['features']}, sha256 {about['detector_sha256']}",
        "reference": f"{_reference(about)}, sha256 {row['reference_sha256']}",
        "data": f"{params.data.source}, sha256 of the images {about['data_sha256']}",
        "params": f"sha256 {runs['params_sha256']}",
        "commit": f"{now['commit']} (+: with edits)" if now["commit"] else now["no_commit"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores{gpus}, {machine['system']}",
        "versions": ", ".join(f"{name} {v}" for name, v in now["versions"].items()),
        "made": now["time"],
    }


def _reference(about: About) -> str:
    """What the first metric is against, and the others."""
    own = f"{about['reference_images']:,} images"
    if (file := about["reference_file"]) is None:
        return own
    return f"{file['url']} of sha256 {file['sha256']}; other metrics {own} of our own data; both"


def record(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a row, but for its pictures and classes."""
    score = read_json(SCORES / f"{name}.json")
    known = {key: value for key, value in score.items() if key not in ("neighbours", "classes")}
    made = {"generated": runs["samples"][name], "scored": runs["scores"][name]}
    return {**known, "train_seconds": train_seconds(score["model"], score["kimg"]), **made}


def neighbours_note(params: Params, about: About) -> str:
    """How to read the nearest training images."""
    if (m := params.metric.memorisation) is None:
        return ""
    return (
        "Above, of each class the sample that comes nearest to a training image; below each, its "
        f"{m.k} nearest of {about['looked_through']:,} training images, by features. A "
        f"near-duplicate is as near as {m.expected:.1%} of the training images are to one another: "
        "a share well above that says that training images come back."
    )
