"""A folder as model hubs show it: weights, their JSON, samples, and a model card.

`fewstep.load` reads it; nothing is uploaded.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from fewstep.export.card import card
from fewstep.export.order import Order
from fewstep.files import replace_folder
from fewstep.networks.weights import save_model
from fewstep.report import tile
from fewstep.report.drawn import COLUMNS, SHORTEST, save

SUFFIX = ""
LINES = 4  # of the grid of samples


def write(order: Order, path: Path) -> None:
    """Write model.safetensors, model.json, README.md, samples.png and, if logged, curves.png."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, order.student.denoiser.state_dict(), order.about())
        pictures = ["samples.png"] + (["curves.png"] if _curves(order, folder) else [])
        _samples(order, folder / "samples.png")
        (folder / "README.md").write_text(card(order, pictures, _USE), encoding="utf-8")
        replace_folder(folder, path)


_USE = """\
```python
import fewstep  # pip install fewstep

student = fewstep.load("{folder}")  # this folder
images = student.sample(16, seeds=range(16){how})  # uint8 (16, {height}, {width}, {channels})
```
"""


def _samples(order: Order, file: Path) -> None:
    r, count = order.row, LINES * COLUMNS
    images = order.student.sample(
        count, steps=r.steps, sampler=r.sampler, guidance_scale=r.guidance_scale
    ).transpose(0, 3, 1, 2)
    save(file, tile(images, COLUMNS, max(1, SHORTEST // (COLUMNS * images.shape[-1]))))


def _curves(order: Order, folder: Path) -> bool:
    """Draw the losses of its training, if their log is there."""
    if (logged := order.log()) is None:
        return False
    from fewstep.report.charts import loss_curves  # matplotlib takes a second to import
    from fewstep.report.frames import logs_frame

    name, root = logged
    loss_curves(logs_frame([name], root), [name], folder / "curves.png")
    return True
