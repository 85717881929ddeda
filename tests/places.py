"""Where the tests find what is not theirs."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config"
DEFAULT = CONFIG / "fmnist16.yaml"  # params.yaml as it comes; a user may have another one there
VECTORS = Path(__file__).parent / "data" / "parity"
