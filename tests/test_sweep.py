"""Rows from one block: what is written into params.yaml, what stays, and what is refused."""

from pathlib import Path

import pytest
import yaml

from experiment import tiny_params
from fewstep.cli import main
from fewstep.params import ParamsError, load_params, swept_rows
from fewstep.sampling.batches import seed_ranges

STEPS = {"model": "cd", "sampler": "ddim", "steps": [1, 2, 4], "guidance_scale": [1.0]}
BOTH = {"model": "teacher", "sampler": "euler", "steps": [2, 3], "guidance_scale": [1.0, 1.5]}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_params(tmp_path)


def put_sweeps(sweeps: dict[str, object]) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(f"# mine\n{text}{yaml.safe_dump({'sweeps': sweeps})}")


def test_every_step_meets_every_scale_and_no_name_has_a_dot() -> None:
    rows = swept_rows({"t": BOTH})
    assert list(rows) == ["t-2-g1", "t-2-g1p5", "t-3-g1", "t-3-g1p5"]
    assert rows["t-3-g1p5"] == {
        "model": "teacher",
        "sampler": "euler",
        "steps": 3,
        "guidance_scale": 1.5,
    }


def test_seed_ranges_of_a_sweep_are_those_of_its_rows() -> None:
    put_sweeps({"steps": {**STEPS, "seed_ranges": 3}})
    main(["sweep"])
    params = load_params()
    rows = {name: len(seed_ranges(params.generate, row)) for name, row in params.rows.items()}
    assert rows["steps-1"] == rows["steps-4"] == 3 and rows["cd-4"] == 1


@pytest.mark.filterwarnings("ignore:.*guides")
def test_the_command_writes_rows_keeps_the_rest_and_can_be_repeated() -> None:
    before = load_params().rows
    put_sweeps({"steps": STEPS, "t": BOTH})
    with pytest.raises(ParamsError, match=r"steps-1, steps-2, steps-4; write .*sweeps\.steps"):
        load_params()
    main(["sweep"])
    text = Path("params.yaml").read_text()
    assert text.startswith("# mine\n")
    rows = load_params().rows
    assert list(rows) == [*before, *swept_rows({"steps": STEPS, "t": BOTH})]
    assert {name: rows[name] for name in before} == before
    assert rows["steps-4"].steps == 4 and rows["t-2-g1p5"].guidance_scale == 1.5
    main(["sweep"])
    assert Path("params.yaml").read_text() == text


def test_rows_that_left_the_block_go() -> None:
    put_sweeps({"steps": STEPS})
    main(["sweep"])
    rest, _, end = Path("params.yaml").read_text().rpartition("    - 2\n")
    Path("params.yaml").write_text(rest + end)
    main(["sweep"])
    assert [name for name in load_params().rows if name.startswith("steps-")] == [
        "steps-1",
        "steps-4",
    ]


def test_a_model_that_does_not_exist_is_refused() -> None:
    put_sweeps({"steps": {**STEPS, "model": "nobody"}})
    with pytest.raises(SystemExit, match=r"got 'nobody'.*rows\.steps-1\.model"):
        main(["sweep"])
