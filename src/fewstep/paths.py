"""The place of every artefact of the pipeline."""

from pathlib import Path

DATA = Path("artifacts/data.lmdb")
STATS = Path("artifacts/ref-stats.npz")
STATS_ABOUT = Path("artifacts/ref-stats.json")
CODE = Path("artifacts/code")
SETTINGS = Path("artifacts/settings")
MODELS = Path("artifacts/models")
SNAPSHOTS = Path("artifacts/snapshots")
SAMPLES = Path("artifacts/samples")
SCORES = Path("artifacts/scores")
PICTURES = Path("artifacts/pictures")
EXPORTS = Path("artifacts/export")
RESULTS = Path("results")
SCRATCH = Path("scratch")
TIMES = SCRATCH / "times"  # of trainings; in an output they would change its hash on every run

BEST = "@best"  # behind a training's name: its model of the best validation


def trained(model: str) -> str:
    """The training that made a model: `cd` of `cd` and of `cd@best`."""
    return model.removesuffix(BEST)
