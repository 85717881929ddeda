"""What was measured, as Markdown tables."""

from collections.abc import Iterable, Iterator
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    return "\n".join(lines(found)) + "\n"


def lines(found: dict[str, Any]) -> Iterator[str]:
    rates = found["matmul_flops_per_second"].items()
    yield f"`{found['command']}`, {found['device']}, {found['threads']} threads, "
    yield f"{found['precision']}, medians of {found['pairs']}. "
    yield f"Matrix product: {', '.join(f'{p} {rate / 1e12:.4g} TFLOP/s' for p, rate in rates)}."
    base = found["baseline"]
    if "training" in found:
        yield from ["", "Training, images/s of a step:", ""]
        yield from _comparison(found["training"], "method", base)
        yield from ["", "Parts of a step, % of their sum (wall):", ""]
        yield from _parts(found["training"])
    if "generation" in found:
        yield from ["", "Generation:", ""]
        yield from _comparison(found["generation"], "sampler", base)
        yield from ["", _one_call(found["one_call"])]
    if "features" in found or "data" in found:
        yield from ["", *table(["", "images/s", "images/s of processor"], _rates(found))]
    if "data" in found:
        yield from ["", _imagenet(found["data"]["ingest"])]


def _comparison(rows: dict[str, Any], what: str, base: str) -> Iterator[str]:
    head = [what, "variant", "images/s", "GFLOP an image", "utilisation"]
    head += [f"× {base}", f"× {base}, processor", "memory GiB"]
    yield from table(
        head,
        (
            [
                name,
                variant,
                f"{v['images_per_second']:.4g}",
                f"{row['flops_per_image'] / 1e9:.4g}",
                f"{v['utilisation']:.1%}",
                f"{v['speedup']:.2f}",
                f"{v['cpu_speedup']:.2f}",
                f"{v['memory_gib']:.2f}" if "memory_gib" in v else "",
            ]
            for name, row in rows.items()
            for variant, v in row["variants"].items()
        ),
    )


def _parts(rows: dict[str, Any]) -> Iterator[str]:
    each = [(n, v, m["parts"]) for n, row in rows.items() for v, m in row["variants"].items()]
    names = list(each[0][2])
    yield from table(
        ["method", "variant", *names],
        (
            [method, variant, *(f"{parts[n] / sum(parts.values()):.1%}" for n in names)]
            for method, variant, parts in each
        ),
    )


def _rates(found: dict[str, Any]) -> Iterator[list[str]]:
    def row(name: str, rate: dict[str, float]) -> list[str]:
        pair = (rate["images_per_second"], rate["images_per_cpu_second"])
        return [name, *(f"{value:,.0f}" for value in pair)]

    if features := found.get("features"):
        yield row(f"features, {features['network']}", features["extraction"])
        yield row(f"mean and covariance of {features['dim']}", features["statistics"])
        wall, cpu = features["distance_seconds"]
        yield [f"Fréchet distance in {features['dim']}", f"{wall:.3g} s", f"{cpu:.3g} s"]
    if data := found.get("data"):
        ingest = data["ingest"]
        name = f"build-lmdb of {ingest['images']:,} PNGs of 64x64 in a zip"
        yield row(f"{name}, {ingest['processes']} processes", ingest)
        yield row("LMDB of 64x64x3, build", data["build"])
        yield row("LMDB of 64x64x3, random read into batches", data["random_read"])


def _one_call(joined: dict[str, float]) -> str:
    return (
        f"One call of the network for two batches of {joined['images']} against two, `fast`: "
        f"{joined['speedup']:.2f}, of processor {joined['cpu_speedup']:.2f}."
    )


def _imagenet(ingest: dict[str, Any]) -> str:
    peak, reckoned = (ingest[key] / 2**20 for key in ("peak_bytes", "imagenet_peak_bytes"))
    return (
        f"build-lmdb, all processes together: {peak:,.0f} MiB at most. ImageNet's 1,281,167 images "
        f"at that rate: {ingest['imagenet_minutes']:.3g} minutes, {reckoned:,.0f} MiB."
    )


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
