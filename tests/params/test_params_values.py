"""Single values: what the schema refuses, and in which words."""

import copy
import re
from typing import Any

import pytest

from params_edits import Edit, problems, put, without

REFUSALS: dict[str, tuple[Edit, str]] = {
    "exponent without a point": (
        put("students/cd/lr", "1e-4"),
        "need a number > 0, got the string '1e-4'; write 1.0e-4 (params.yaml: students.cd.lr)",
    ),
    "exponent without a sign": (
        put("students/cd/kimg", "4.8e1"),
        "need a number > 0, got the string '4.8e1'; write 4.8e+1 (params.yaml: students.cd.kimg)",
    ),
    "quoted integer": (
        put("generate/images", "2000"),
        "need an integer >= 1, got the string '2000'; write 2000 (params.yaml: generate.images)",
    ),
    "integer with an exponent": (
        put("generate/images", "2e3"),
        "need an integer >= 1, got the string '2e3'; write 2000 (params.yaml: generate.images)",
    ),
    "word for a number": (
        put("seed", "zero"),
        "need an integer >= 0, got the string 'zero' (params.yaml: seed)",
    ),
    "fraction for an integer": (
        put("network/num_blocks", 1.5),
        "need an integer >= 1, got 1.5 (params.yaml: network.num_blocks)",
    ),
    "boolean for a number": (
        put("noise/rho", True),
        "need a number > 0, got true (params.yaml: noise.rho)",
    ),
    "number for a boolean": (
        put("students/cd/settings/sync_dropout", 1),
        "need true or false, got 1 (params.yaml: students.cd.settings.sync_dropout)",
    ),
    "number for a string": (
        put("data/source", 16),
        "need a path, got 16; put it in quotes (params.yaml: data.source)",
    ),
    "no value": (
        put("students/cd/batch", None),
        "need an integer >= 1, got nothing (params.yaml: students.cd.batch)",
    ),
    "block without keys": (
        put("noise", None),
        "need a mapping, got nothing (params.yaml: noise)",
    ),
    "zero images": (
        put("generate/images", 0),
        "need an integer >= 1, got 0 (params.yaml: generate.images)",
    ),
    "one reference image": (
        put("metric/reference_images", 1),
        "need an integer >= 2, got 1 (params.yaml: metric.reference_images)",
    ),
    "wide power ema": (
        put("students/cd/ema", {"kind": "power", "std": 0.3}),
        "need a number > 0 and < 0.289, got 0.3 (params.yaml: students.cd.ema.std)",
    ),
    "unknown choice": (
        put("rows/cd-4/sampler", "dim"),
        "need one of heun, euler, ddim, renoise, ancestral, churn, got 'dim'; did you "
        "mean 'ddim'? (params.yaml: rows.cd-4.sampler)",
    ),
    "item of a list": (
        put("students/cd/settings/teacher_edges", [1, 16]),
        "need an integer >= 2, got 1 (params.yaml: students.cd.settings.teacher_edges[0])",
    ),
    "length of a list": (
        put("students/cd/betas", [0.9]),
        "need a list of two numbers in [0, 1), got [0.9] (params.yaml: students.cd.betas)",
    ),
    "unknown key at the top": (
        put("sed", 0),
        "unknown key 'sed'; did you mean 'seed'? (params.yaml)",
    ),
    "unknown key": (
        put("students/cd/learning_rate", 1.0),
        "unknown key 'learning_rate'; did you mean 'lr'? (params.yaml: students.cd)",
    ),
    "unknown key like none": (
        put("noise/colour", "white"),
        "unknown key 'colour'; known keys: sigma_min, sigma_max, rho (params.yaml: noise)",
    ),
    "setting of another method": (
        put("students/cd/settings/dm_epsilon", 0.0),
        "unknown key 'dm_epsilon'; known keys: sigma_max, sigma_min, steps, "
        "teacher_edges, anneal_kimg, edges, uniform_share, terminal_anchor, "
        "terminal_teacher_hop, addim, sync_dropout, distance, weight (params.yaml: "
        "students.cd.settings)",
    ),
    "key of another ema": (
        put("students/cd/ema", {"kind": "none", "std": 0.1}),
        "unknown key 'std'; known keys: kind (params.yaml: students.cd.ema)",
    ),
    "missing key": (
        without("students/cd/lr"),
        "need a number > 0: peak learning rate, got no such key (params.yaml: students.cd.lr)",
    ),
    "missing block": (
        without("noise"),
        "need a mapping: the Karras schedule of every grid, got no such key (params.yaml: noise)",
    ),
    "missing init_from": (
        without("students/cd/init_from"),
        "need teacher, the name of another student or of an import: whose weights it "
        "starts from, got no such key (params.yaml: students.cd.init_from)",
    ),
    "capitals in a student's name": (
        lambda raw: raw["students"].update(CD=copy.deepcopy(raw["students"]["cd"])),
        "need a student name of a-z, 0-9 and '-' that starts with a letter or digit and "
        "is not 'teacher', got 'CD' (params.yaml: students)",
    ),
    "a student's name with @": (
        lambda raw: raw["students"].update({"cd@best": copy.deepcopy(raw["students"]["cd"])}),
        "need a student name of a-z, 0-9 and '-' that starts with a letter or digit and "
        "is not 'teacher', got 'cd@best'; '@' is for rows, where NAME@best is the model "
        "that validation chose (params.yaml: students)",
    ),
    "number for a row's name": (
        lambda raw: raw["rows"].update({8: raw["rows"]["cd-4"]}),
        "need a row name of a-z, 0-9 and '-' that starts with a letter or digit, got 8; "
        "put it in quotes (params.yaml: rows)",
    ),
    "no rows": (
        put("rows", {}),
        "need a mapping of at least one row name to a block, got {} (params.yaml: rows)",
    ),
    "sha256 of md5's length": (
        put("teacher", {"url": "t.safetensors", "sha256": "0a" * 16}),
        "need 64 lowercase hex digits, got '0a0a0a0a0a0a...a0a0a0a0a0a0a' (params.yaml: "
        "teacher.sha256)",
    ),
    "teacher at an address without a checksum": (
        put("teacher", {"url": "https://example.org/t.safetensors"}),
        "need the sha256 of a file at an address, 64 hex digits or unknown, got no such key "
        "(params.yaml: teacher.sha256)",
    ),
    "teacher both trained and downloaded": (
        put("teacher/url", "t.safetensors"),
        "need no such key beside train, got 't.safetensors' (params.yaml: teacher.url)",
    ),
    "teacher that starts from a teacher": (
        put("teacher/train/init_from", "teacher"),
        "need no such key in a teacher, got 'teacher' (params.yaml: teacher.train.init_from)",
    ),
    "churn block for heun": (
        put("rows/cd-4/churn", {}),
        "need no such key unless sampler is churn, got {} (params.yaml: rows.cd-4.churn)",
    ),
    "churn without its block": (
        put("rows/cd-4/sampler", "churn"),
        "need a mapping: EDM's stochastic sampler, Algorithm 2, got no such key "
        "(params.yaml: rows.cd-4.churn)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_one_line(case: str) -> None:
    edit, message = REFUSALS[case]
    assert problems(edit) == [message]


def test_student_named_teacher_is_refused() -> None:
    [line] = problems(lambda raw: raw["students"].update(teacher=raw["students"]["cd"]))
    assert line.endswith("is not 'teacher', got 'teacher' (params.yaml: students)")


def test_misspelt_key_is_one_problem_not_two() -> None:
    def edit(raw: dict[str, Any]) -> None:
        cd = raw["students"]["cd"]
        cd["learning_rate"], cd["init_form"] = cd.pop("lr"), cd.pop("init_from")

    assert problems(edit) == [
        "unknown key 'learning_rate'; did you mean 'lr'? (params.yaml: students.cd)",
        "unknown key 'init_form'; did you mean 'init_from'? (params.yaml: students.cd)",
    ]


def test_all_problems_are_reported_at_once() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["sead"] = 0
        raw["noise"].update(sigma_min=90.0, sigma_max=80.0)
        raw["students"]["cd"]["lr"] = "1e-4"
        raw["students"]["dmd2-1"].update(batch=32, batch_gpu=5)
        raw["rows"]["cd-4"]["model"] = "ce"
        del raw["metric"]["features"]

    lines = problems(edit)
    assert len(lines) == 6
    assert sum("students.cd" in line for line in lines) == 1
    for part in ("'sead'", "sigma_max", "1.0e-4", "batch_gpu", "'ce'", "metric.features"):
        assert sum(part in line for line in lines) == 1, part


def test_method_that_is_missing_brings_no_flood() -> None:
    assert problems(without("students/cd/method")) == [
        "need one of consistency, denoising, dmd2, moment_matching: how it is trained, "
        "got no such key (params.yaml: students.cd.method)"
    ]


@pytest.mark.parametrize("block", ["imports", "students", "rows", "sweeps"])
def test_a_name_with_a_dot_is_refused_with_one_that_dvc_takes(block: str) -> None:
    blocks = {"imports": {"url": "x.pt", "sha256": "0" * 64}}

    def edit(raw: dict[str, Any]) -> None:
        like = blocks.get(block) or next(iter(raw["rows" if block == "sweeps" else block].values()))
        more = {"steps": [4], "guidance_scale": [1.0]} if block == "sweeps" else {}
        raw.setdefault(block, {})["cd.v2"] = {**like, **more}

    lines = problems(edit)
    assert re.match(r"need a .*name of a-z, 0-9 and '-' ", lines[0])
    end = f"got 'cd.v2'; write cd-v2, because DVC splits names at dots (params.yaml: {block})"
    assert lines[0].endswith(end)
