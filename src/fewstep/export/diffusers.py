"""A folder that diffusers opens as a pipeline, without fewstep: it brings the code of both.

`DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` runs it:
pipeline.py and denoiser/network.py, made of this package's own modules.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from fewstep.export.bundle import bundle
from fewstep.export.card import card
from fewstep.export.order import Order
from fewstep.export.program import portable
from fewstep.files import replace_folder, write_json
from fewstep.report import tile
from fewstep.report.drawn import save

SUFFIX = ""
TEMPLATES = Path(__file__).parent / "templates"
VERSION = "0.30.0"  # the first whose loader finds a component's code beside its weights


def write(order: Order, path: Path) -> None:
    """Write model_index.json, pipeline.py, the component `denoiser`, and a model card."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "denoiser").mkdir()
        _write_denoiser(order, folder / "denoiser")
        (folder / "pipeline.py").write_text(_code("pipeline", {}), encoding="utf-8")
        write_json(folder / "model_index.json", _index(order))
        r = order.row
        images = order.student.sample(
            10, steps=r.steps, sampler=r.sampler, guidance_scale=r.guidance_scale
        )
        save(folder / "samples.png", tile(images.transpose(0, 3, 1, 2), 10, 2))
        (folder / "README.md").write_text(card(order, ["samples.png"], _USE), encoding="utf-8")
        replace_folder(folder, path)


_USE = """\
```python
from diffusers import DiffusionPipeline

here = "{folder}"  # this folder
pipeline = DiffusionPipeline.from_pretrained(here, custom_pipeline=here, trust_remote_code=True)
images = pipeline(seeds=range(16)).images  # {width}x{height} pixels, {steps} steps
```

`trust_remote_code` runs pipeline.py and denoiser/network.py of this folder; fewstep is not needed.
"""


def _write_denoiser(order: Order, folder: Path) -> None:
    student = order.student
    network = student.denoiser.model
    config = {
        "_class_name": "FewStepDenoiser",
        "_diffusers_version": VERSION,
        "architecture": asdict(network.architecture),
        "sigma_data": student.denoiser.sigma_data,
    }
    write_json(folder / "config.json", config)
    code = _code("network", {"fewstep.networks.adm": type(network).__module__})
    (folder / "network.py").write_text(code, encoding="utf-8")
    weights = {f"denoiser.{k}": w.contiguous() for k, w in portable(student).state_dict().items()}
    # diffusers refuses a file that does not name its framework
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _index(order: Order) -> dict[str, object]:
    r = order.row
    how = {"sampler": r.sampler, "steps": r.steps, "guidance_scale": r.guidance_scale}
    return {
        "_class_name": ["pipeline", "FewStepPipeline"],
        "_diffusers_version": VERSION,
        "denoiser": ["network", "FewStepDenoiser"],
        **how,
        **vars(order.student.grid),
    }


def _code(name: str, instead: dict[str, str]) -> str:
    return bundle((TEMPLATES / f"{name}.py").read_text(encoding="utf-8"), instead)
