"""config/tiny.yaml with an edit: what loads, and what is wrong with it."""

import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.params import Params, ParamsError, load_params
from places import CONFIG

PRESETS = sorted(CONFIG.glob("*.yaml"))
TINY = (CONFIG / "tiny.yaml").read_text()

Edit = Callable[[dict[str, Any]], object]


def load_text(text: str) -> Params:
    """The params of a params.yaml with that text, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("params.yaml").write_text(text)
        return load_params()


def load_edited(edit: Edit) -> Params:
    raw = yaml.safe_load(TINY)
    edit(raw)
    return load_text(yaml.safe_dump(raw, sort_keys=False))


def problems(edit: Edit) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        load_edited(edit)
    return str(caught.value).splitlines()


def put(path: str, value: object) -> Edit:
    """An edit that sets the value at a dotted path."""

    def edit(raw: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            raw = raw[key]
        raw[last] = value

    return edit


def without(path: str) -> Edit:
    def edit(raw: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            raw = raw[key]
        del raw[last]

    return edit
