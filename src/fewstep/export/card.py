"""The model card: what the weights are, how good, where they come from, and under what licence."""

from collections.abc import Sequence

import yaml

from fewstep.export.order import DERIVED, UNSTATED, Order, plain_text
from fewstep.report.text import measured
from fewstep.theory.sample import nfe

ALT = {
    "samples.png": "Samples: seeds 0 to 39, a class for each in turn",
    "curves.png": "Losses and validations of its training over thousands of images",
}


def card(order: Order, pictures: Sequence[str], use: str) -> str:
    """The text of README.md, with YAML front matter as hubs read it.

    Args:
        pictures: files beside it.
        use: Markdown on how to sample, a format string.
    """
    r, (channels, height, width) = order.row, order.student.shape
    calls = nfe(r.sampler, r.steps, r.guidance_scale)
    how = f", guidance_scale={r.guidance_scale:g}" if r.guidance_scale != 1 else ""
    lines = [
        _front(order),
        f"# {plain_text(order.student.name)}",
        f"Draws images of {height}x{width} pixels, {channels} channel{'s' * (channels > 1)}, "
        f"{order.student.classes} classes, in {calls} network call{'s' * (calls > 1)}: "
        f"{r.sampler}, {r.steps} step{'s' * (r.steps > 1)}, guidance scale {r.guidance_scale:g}.",
        *(f"![{ALT[p]}]({p})" for p in pictures if p == "samples.png"),
        "## How to sample",
        use.format(
            folder=".", how=how, height=height, width=width, channels=channels, steps=r.steps
        ).strip(),
        "## Results",
        _results(order),
        *(f"![{ALT[p]}]({p})" for p in pictures if p != "samples.png"),
        "## Where it comes from",
        "\n".join(["| | |", "|:--|:--|", *(f"| {k} | {v} |" for k, v in order.origin().items())]),
        "## Licence",
        _licence(order),
    ]
    return "\n\n".join(lines) + "\n"


def _front(order: Order) -> str:
    method = order.origin().get("method")
    about = {
        "license": order.license or "other",
        **({} if order.license else {"license_name": "not-stated"}),
        "library_name": "fewstep",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "distillation", "edm", *([method] if method else [])],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def _licence(order: Order) -> str:
    if order.license is None:
        return (
            f"Licence of the weights: **{UNSTATED}**. {DERIVED} Before you publish or use them, "
            "find out the licences of the teacher and the training data named above."
        )
    return f"Licence of the weights, as stated by who exported them: {order.license}. {DERIVED}"


def _results(order: Order) -> str:
    """A table of the scores of exactly these weights."""
    if not (rows := order.scores()):
        return "No score of exactly these weights was at hand when they were exported."
    head = ("row", "sampler", "steps", "network calls", "guidance scale", "metric", "value")
    lines = [f"| {' | '.join((*head, 'images'))} |", "|:--" * len(head) + "|--:|"]
    for row in rows:
        keys = ("row", "sampler", "steps", "nfe", "guidance_scale", "metric")
        cells = [plain_text(row.get(key, "")) for key in keys]
        cells += [measured(row.get("value"), row.get("std")), f"{row.get('images', 0):,}"]
        lines.append(f"| {' | '.join(cells)} |")
    data = plain_text(rows[0].get("reference_images", "some"))
    lines += ["", f"Distances to {data} training images; lower is better."]
    if any(row.get("metric") == "FD-EffLite0" for row in rows):
        lines.append("FD-EffLite0 is no FID and compares with no published FID.")
    return "\n".join(lines)
