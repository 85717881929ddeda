"""Params files in DVC's style: the same values, and a variation is a diff of one line."""

import difflib
from pathlib import Path

import pytest
import yaml

from fewstep.params.style import styled
from places import CONFIG

PRESETS = sorted(file.stem for file in CONFIG.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_variation_of_a_styled_preset_changes_one_line(preset: str, tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` calls

    text = (CONFIG / f"{preset}.yaml").read_text()
    before = styled(text)
    assert yaml.safe_load(before) == yaml.safe_load(text)
    assert styled(before) == before
    file = tmp_path / "params.yaml"
    file.write_text(before)
    apply_overrides(str(file), ["seed=7"])
    pairs = difflib.ndiff(before.splitlines(), file.read_text().splitlines())
    changed = [line for line in pairs if line[0] in "+-"]
    assert [line[2:].partition(":")[0] for line in changed] == ["seed", "seed"]
    lost = text.count("#") - before.count("#")
    assert lost == 0, "comments stay"


def test_a_mapping_too_long_for_a_line_becomes_a_block() -> None:
    row = "a: { model: teacher, sampler: heun, steps: 18, guidance_scale: 1.0, seed_ranges: 1 }"
    assert styled(f"rows:\n  {row}").removeprefix("rows:\n").splitlines()[:2] == [
        "  a:",
        "    model: teacher",
    ]
    assert styled("rows:\n  a: { steps: 18 }\n") == "rows:\n  a: {steps: 18}\n"
