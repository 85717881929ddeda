"""What can be seen of the data before anything runs: whether it is there, fits and is enough."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.sources import open_source
from fewstep.data.stream import FileStream
from fewstep.params import Params


@dataclass(frozen=True)
class Need:
    """So many images of the data are needed, for what, and the keys that ask for them."""

    images: int
    what: str
    keys: str


def image_needs(params: Params) -> Iterator[Need]:
    """What the references, rows and validations of the params ask of the data.

    The floor is the distance of other real images to those of the reference: as many as a row has,
    or any two beside published statistics (`metrics.reference.floor_images`).
    """
    m, images = params.metric, params.generate.images
    floor = 2 if m.reference else images
    keys = "metric.reference_images" + ("" if m.reference else ", generate.images")
    what = f"{m.reference_images} of the reference and {floor} others for the floor"
    yield Need(m.reference_images + floor, what, keys)
    if m.memorisation is not None and m.memorisation.images is not None:
        yield Need(m.memorisation.images, "those looked through", "metric.memorisation.images")
    for name, student in params.students.items():
        if m.reference is None and (v := student.validation) is not None:
            key = f"students.{name}.validation.reference_images"
            yield Need(v.reference_images, "the reference of a validation", key)


def data_problems(params: Params, file: str) -> Iterator[str]:
    """Problems of the data that is there, each with the key of the params file to edit."""
    d = params.data
    try:
        source = open_source(d.source, d.resolution, d.channels, d.classes)
        if isinstance(source, FileStream):
            source[0]  # the size of image files is known once one is decoded
    except ValueError as error:
        yield str(error).replace("(params.yaml:", f"({file}:")
        return
    for need in dict.fromkeys(image_needs(params)):
        if need.images > len(source):
            yield (
                f"need {need.images} images, {need.what}, got {len(source)} in {d.source} "
                f"({file}: {need.keys})"
            )


def compiled_on_cpu(params: Params, file: str) -> Iterator[str]:
    """A line if blocks with plain attention are compiled in half precision, maybe on a CPU.

    PyTorch 2.13 compiles these, and only these, to gradients of NaN on CPUs that multiply in
    bfloat16 by AVX-512.
    """
    how, half = params.performance, params.precision in ("bf16", "fp16")
    if params.device != "cuda" and half and (how.compile, how.attention) == ("blocks", "plain"):
        yield (
            f"need attention: fused with compile: blocks on a CPU, got plain, in {params.precision}"
            f", whose gradients can be NaN there ({file}: performance.attention; device: cuda says "
            "that there is a GPU)"
        )


def absent_source(params: Params, file: str) -> Iterator[str]:
    """A line if the source is neither there nor can be fetched."""
    if not Path(params.data.source).exists() and params.data.url is None:
        yield (
            f"need a file or folder at {params.data.source}, got nothing there ({file}: "
            "data.source)"
        )
