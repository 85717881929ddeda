"""params.yaml: what is read, what is refused, and in which words."""

import copy
import pickle
import re
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from fewstep import params as module
from fewstep.params import (
    Generate,
    Params,
    ParamsError,
    Performance,
    Row,
    digest,
    load_params,
    plain,
)

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "config" / "params.schema.yaml"
PRESETS = sorted(set((ROOT / "config").glob("*.yaml")) - {SCHEMA})
TINY = (ROOT / "config" / "tiny.yaml").read_text()

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load_text(text: str) -> Params:
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


# --- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_without_a_warning(preset: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_params(preset), Params)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_yaml_1_1_and_1_2_read_the_same_preset(preset: Path) -> None:
    text = preset.read_text()
    assert YAML(typ="safe", pure=True).load(text) == yaml.safe_load(text)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_as_dict_is_the_file_and_reads_back(preset: Path) -> None:
    params = load_params(preset)
    usual = {"performance": plain(Performance())}
    assert params.as_dict() == usual | yaml.safe_load(preset.read_text())
    assert load_text(yaml.safe_dump(params.as_dict())) == params


def test_default_preset_is_params_yaml() -> None:
    default = (ROOT / "config" / "fmnist16.yaml").read_bytes()
    assert default == (ROOT / "params.yaml").read_bytes()


# --- the schema, the dataclasses and the README agree ------------------------------------------


def blocks(rule: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of properties in the schema, with where it is."""
    if isinstance(rule, dict):
        if isinstance(rule.get("properties"), dict):
            yield path, rule["properties"]
        for key, inner in rule.items():
            yield from blocks(inner, f"{path}/{key}")
    elif isinstance(rule, list):
        for index, inner in enumerate(rule):
            yield from blocks(inner, f"{path}/{index}")


SCHEMA_RULES = yaml.safe_load(SCHEMA.read_text())
CLASS_OF_BLOCK = {
    "": module.Params,
    **{
        f"/properties/{name}": getattr(module, name.capitalize())
        for name in ("data", "network", "noise", "teacher", "generate", "metric")
    },
    **{
        f"/$defs/{name}": getattr(module, name.capitalize()) for name in ("student", "row", "churn")
    },
    **{f"/$defs/{name}": settings for name, settings in module.SETTINGS.items()},
}


def test_schema_is_a_schema_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(SCHEMA_RULES)
    described = {
        key
        for _, properties in blocks(SCHEMA_RULES)
        for key, rule in properties.items()
        if isinstance(rule, dict) and ("description" in rule or "$ref" in rule)
    }
    assert described == {key for _, properties in blocks(SCHEMA_RULES) for key in properties}


@pytest.mark.parametrize("path", CLASS_OF_BLOCK, ids=lambda path: path or "top")
def test_dataclass_has_the_keys_and_choices_of_its_block(path: str) -> None:
    properties = dict(blocks(SCHEMA_RULES))[path]
    hints = typing.get_type_hints(kind := CLASS_OF_BLOCK[path])
    assert is_dataclass(kind)
    assert hints.keys() - {"as_dict"} == properties.keys()
    for key, rule in properties.items():
        if isinstance(rule, dict) and "enum" in rule:
            choices = typing.get_args(hints[key])
            if type(None) in choices:  # an optional key
                choices = typing.get_args(choices[0])
            assert list(choices) == rule["enum"], key


def test_readme_explains_every_key() -> None:
    readme = (ROOT / "config" / "README.md").read_text()
    keys = {key for _, properties in blocks(SCHEMA_RULES) for key in properties}
    assert not [key for key in sorted(keys) if not re.search(rf"`{key}\b", readme)]


# --- what loads ----------------------------------------------------------------------------------


def test_keys_of_the_build_are_optional_and_change_no_digest() -> None:
    params = load_text(TINY)
    assert (params.data.on_error, params.data.workers) == (None, None)
    assert "workers" not in params.as_dict()["data"]
    given = load_text(TINY.replace("data:\n", "data:\n  on_error: skip\n  workers: 3\n"))
    assert (given.data.on_error, given.data.workers) == ("skip", 3)
    assert replace(given, data=params.data) == params


def test_params_are_frozen() -> None:
    params = load_text(TINY)
    with pytest.raises(FrozenInstanceError):
        params.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        params.students["cd"].lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        params.students["new"] = params.students["cd"]  # pyright: ignore[reportIndexIssue]


def test_settings_are_of_the_class_that_the_method_names() -> None:
    params = load_text(TINY)
    assert isinstance(params.students["cd"].settings, module.ConsistencySettings)
    assert isinstance(params.students["dmd2-1"].settings, module.Dmd2Settings)
    assert params.teacher.train and params.teacher.train.init_from is None
    assert isinstance(params.teacher.train.settings, module.DenoisingSettings)
    assert isinstance(params.network.channel_mult, tuple)


def test_whole_numbers_are_one_value_however_written() -> None:
    as_int, as_float = (load_edited(put("students/cd/kimg", kimg)) for kimg in (48, 48.0))
    assert as_int == as_float and digest(as_int) == digest(as_float)
    assert type(as_int.students["cd"].kimg) is float
    assert type(load_edited(put("seed", 3.0)).seed) is int


def test_digest_depends_on_values_alone() -> None:
    student = load_text(TINY).students["cd"]
    assert digest(student) == digest(pickle.loads(pickle.dumps(student)))
    assert digest(student) != digest(replace(student, lr=2 * student.lr))
    assert digest({"b": (1, 2.0), "a": None}) == digest({"a": None, "b": [1, 2.0]})
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_churn_power_ema_and_a_downloaded_teacher_load() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["teacher"] = {"url": "teacher.safetensors", "sha256": "0a" * 32}
        raw["students"]["cd"]["ema"] = {"kind": "power", "std": 0.05}
        raw["rows"]["churned"] = {
            **raw["rows"]["teacher-heun-7"],
            "sampler": "churn",
            "churn": {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
        }

    params = load_edited(edit)
    assert params.teacher.train is None and params.students["cd"].ema.std == 0.05
    assert params.rows["churned"].churn == module.Churn(40.0, 0.05, 50.0, 1.003)


def test_student_may_be_measured_at_steps_it_was_not_trained_for() -> None:
    load_edited(put("rows/dmd2-4-guided/steps", 2))


def test_relative_path_outside_the_repository_finds_the_schema() -> None:
    Path("sub").mkdir()
    Path("sub/mine.yaml").write_text(TINY)
    assert load_params("sub/mine.yaml") == load_params(ROOT / "config" / "tiny.yaml")


def test_small_number_that_dvc_sets_is_a_number() -> None:
    Path("params.yaml").write_text(TINY)
    apply_overrides("params.yaml", ["students.cd.lr=1e-5", "students.cd.kimg=12"])
    assert "lr: 1e-05" in Path("params.yaml").read_text()  # which YAML 1.1 reads as a string
    cd = load_params().students["cd"]
    assert (cd.lr, cd.kimg) == (1e-5, 12.0)


# --- what is refused: the file ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "params.yaml: need a mapping of keys to values, got an empty file"),
        ("# nothing\n", "params.yaml: need a mapping of keys to values, got an empty file"),
        ("- 1\n", "params.yaml: need a mapping of keys to values, got [1]"),
        ("a: [\n", "params.yaml: not valid YAML: line 2, column 1: "),
        ("a:\n\tb: 1\n", "params.yaml: not valid YAML: line 2, column 1: "),
        ("a: 1\n---\nb: 2\n", "params.yaml: not valid YAML: line 2, column 1: "),
        ("a: !!python/name:os.system\n", "params.yaml: not valid YAML: line 1, column 4: could"),
        ("{a: 1}: 2\n", "params.yaml: not valid YAML: line 1, column 1: found unhashable key"),
        ("seed: 2020-13-45\n", "params.yaml: not valid YAML: month must be in 1..12"),
        ("a: \x07\n", "params.yaml: not valid YAML: unacceptable character #x0007"),
    ],
)
def test_file_that_is_no_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParamsError, match="^" + re.escape(message)):
        load_text(text)


def test_missing_file_and_folder_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"^none.yaml: no such file; run in the repository's ro"):
        load_params("none.yaml")
    with pytest.raises(ParamsError, match=r"^\.: cannot be read: Is a directory$"):
        load_params(".")


def test_duplicate_key_is_refused_with_both_lines() -> None:
    with pytest.raises(ParamsError, match=r"^params.yaml: noise.rho: key given twice, in lines \d"):
        load_text(TINY.replace("  rho: 7.0\n", "  rho: 7.0\n  rho: 5.0\n"))


@pytest.mark.parametrize("text", ["010", "1_000", "1:30", "0x10"])
def test_number_that_yamls_read_apart_is_refused(text: str) -> None:
    message = f"params.yaml: seed: YAML 1.1 and 1.2 may read {text} differently; write a finite "
    with pytest.raises(ParamsError, match=re.escape(message)):
        load_text(TINY.replace("seed: 0\n", f"seed: {text}\n", 1))


def test_boolean_that_yamls_read_apart_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"students.cd.settings.sync_dropout: YAML 1.1 and 1.2"):
        load_text(TINY.replace("sync_dropout: true", "sync_dropout: on"))


@pytest.mark.parametrize("text", [".nan", ".inf", "1.0e+999"])
def test_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(ParamsError, match=r"params.yaml: noise.rho: .* finite "):
        load_text(TINY.replace("rho: 7.0", f"rho: {text}"))


def test_self_containing_yaml_is_refused_not_followed() -> None:
    with pytest.raises(ParamsError, match=r"students.cd.method: missing"):
        load_text(
            re.sub(r"(?s)students:\n.*?\ngenerate:", "students: &s {cd: *s}\ngenerate:", TINY)
        )


# --- what is refused: one value -----------------------------------------------------------------

REFUSALS: dict[str, tuple[Edit, str]] = {
    "exponent without a point": (
        put("students/cd/lr", "1e-4"),
        "params.yaml: students.cd.lr: need a number > 0, got the string '1e-4'; write 1.0e-4",
    ),
    "exponent without a sign": (
        put("students/cd/kimg", "4.8e1"),
        "params.yaml: students.cd.kimg: need a number > 0, got the string '4.8e1'; write 4.8e+1",
    ),
    "quoted integer": (
        put("generate/images", "2000"),
        "params.yaml: generate.images: need an integer >= 1, got the string '2000'; write 2000",
    ),
    "integer with an exponent": (
        put("generate/images", "2e3"),
        "params.yaml: generate.images: need an integer >= 1, got the string '2e3'; write 2000",
    ),
    "word for a number": (
        put("seed", "zero"),
        "params.yaml: seed: need an integer >= 0, got the string 'zero'",
    ),
    "fraction for an integer": (
        put("network/num_blocks", 1.5),
        "params.yaml: network.num_blocks: need an integer >= 1, got 1.5",
    ),
    "boolean for a number": (
        put("noise/rho", True),
        "params.yaml: noise.rho: need a number > 0, got true",
    ),
    "number for a boolean": (
        put("students/cd/settings/sync_dropout", 1),
        "params.yaml: students.cd.settings.sync_dropout: need true or false, got 1",
    ),
    "number for a string": (
        put("data/source", 16),
        "params.yaml: data.source: need a path, got 16; put it in quotes",
    ),
    "no value": (
        put("students/cd/batch", None),
        "params.yaml: students.cd.batch: need an integer >= 1, got nothing",
    ),
    "block without keys": (
        put("noise", None),
        "params.yaml: noise: need a mapping, got nothing",
    ),
    "zero images": (
        put("generate/images", 0),
        "params.yaml: generate.images: need an integer >= 1, got 0",
    ),
    "one reference image": (
        put("metric/reference_images", 1),
        "params.yaml: metric.reference_images: need an integer >= 2, got 1",
    ),
    "wide power ema": (
        put("students/cd/ema", {"kind": "power", "std": 0.3}),
        "params.yaml: students.cd.ema.std: need a number > 0 and < 0.289, got 0.3",
    ),
    "unknown choice": (
        put("rows/cd-4/sampler", "dim"),
        "params.yaml: rows.cd-4.sampler: need one of heun, euler, ddim, renoise, churn, got 'dim'"
        "; did you mean 'ddim'?",
    ),
    "item of a list": (
        put("students/cd/settings/teacher_edges", [1, 16]),
        "params.yaml: students.cd.settings.teacher_edges[0]: need an integer >= 2, got 1",
    ),
    "length of a list": (
        put("students/cd/betas", [0.9]),
        "params.yaml: students.cd.betas: need a list of two numbers in [0, 1), got [0.9]",
    ),
    "unknown key at the top": (
        put("sed", 0),
        "params.yaml: unknown key 'sed'; did you mean 'seed'?",
    ),
    "unknown key": (
        put("students/cd/learning_rate", 1.0),
        "params.yaml: students.cd: unknown key 'learning_rate'; did you mean 'lr'?",
    ),
    "unknown key like none": (
        put("noise/colour", "white"),
        "params.yaml: noise: unknown key 'colour'; known keys: sigma_min, sigma_max, rho",
    ),
    "setting of another method": (
        put("students/cd/settings/dm_epsilon", 0.0),
        "params.yaml: students.cd.settings: unknown key 'dm_epsilon'; known keys: steps, "
        "teacher_edges, anneal_kimg, edges, uniform_share, terminal_anchor, terminal_teacher_hop, "
        "sync_dropout, distance, weight",
    ),
    "key of another ema": (
        put("students/cd/ema", {"kind": "none", "std": 0.1}),
        "params.yaml: students.cd.ema: unknown key 'std'; known keys: kind",
    ),
    "missing key": (
        without("students/cd/lr"),
        "params.yaml: students.cd.lr: missing; need a number > 0: peak learning rate",
    ),
    "missing block": (
        without("noise"),
        "params.yaml: noise: missing; need a mapping: the Karras schedule of every grid",
    ),
    "missing init_from": (
        without("students/cd/init_from"),
        "params.yaml: students.cd.init_from: missing; need teacher, the name of another student or "
        "of an import: whose weights it starts from",
    ),
    "capitals in a student's name": (
        lambda raw: raw["students"].update(CD=copy.deepcopy(raw["students"]["cd"])),
        "params.yaml: students: need a student name of a-z, 0-9, '.' and '-' that starts with a "
        "letter or digit and is not 'teacher', got 'CD'",
    ),
    "number for a row's name": (
        lambda raw: raw["rows"].update({8: raw["rows"]["cd-4"]}),
        "params.yaml: rows: need a row name of a-z, 0-9, '.' and '-' that starts with a letter or "
        "digit, got 8; put it in quotes",
    ),
    "no rows": (
        put("rows", {}),
        "params.yaml: rows: need a mapping of at least one row name to a block, got {}",
    ),
    "sha256 of md5's length": (
        put("teacher", {"url": "t.safetensors", "sha256": "0a" * 16}),
        "params.yaml: teacher.sha256: need 64 lowercase hex digits, "
        "got '0a0a0a0a0a0a...a0a0a0a0a0a0a'",
    ),
    "teacher without a checksum": (
        put("teacher", {"url": "t.safetensors"}),
        "params.yaml: teacher.sha256: missing; need 64 lowercase hex digits: checksum of the file "
        "at url",
    ),
    "teacher both trained and downloaded": (
        put("teacher/url", "t.safetensors"),
        "params.yaml: teacher.url: need no such key beside train, got 't.safetensors'",
    ),
    "teacher that starts from a teacher": (
        put("teacher/train/init_from", "teacher"),
        "params.yaml: teacher.train.init_from: need no such key in a teacher, got 'teacher'",
    ),
    "churn block for heun": (
        put("rows/cd-4/churn", {}),
        "params.yaml: rows.cd-4.churn: need no such key unless sampler is churn, got {}",
    ),
    "churn without its block": (
        put("rows/cd-4/sampler", "churn"),
        "params.yaml: rows.cd-4.churn: missing; need a mapping: EDM's stochastic sampler, "
        "Algorithm 2",
    ),
    # Values that only conflict with one another.
    "sigmas in the wrong order": (
        lambda raw: raw["noise"].update(sigma_min=90.0, sigma_max=80.0),
        "need sigma_min < sigma_max, got 90.0 and 80.0 (params.yaml: noise.sigma_min)",
    ),
    "resolution that cannot be halved": (
        lambda raw: (
            raw["data"].update(resolution=18),
            raw["network"].update(channel_mult=[1, 2, 2]),
        ),
        "need resolution divisible by 4 for 3 levels of channel_mult, got 18 "
        "(params.yaml: data.resolution)",
    ),
    "batch_gpu that does not divide": (
        lambda raw: raw["students"]["cd"].update(batch=64, batch_gpu=48),
        "need batch divisible by batch_gpu, got 64 and 48; a batch_gpu of 32 or 64 would do "
        "(params.yaml: students.cd.batch_gpu)",
    ),
    "batch_gpu beyond batch, of the teacher": (
        lambda raw: raw["teacher"]["train"].update(batch=64, batch_gpu=128),
        "need batch divisible by batch_gpu, got 64 and 128; a batch_gpu of 64 would do "
        "(params.yaml: teacher.train.batch_gpu)",
    ),
    "teacher edges that shrink": (
        put("students/cd/settings/teacher_edges", [16, 8]),
        "need start <= end of teacher_edges, got 16 and 8 "
        "(params.yaml: students.cd.settings.teacher_edges)",
    ),
    "empty dm_levels": (
        put("students/dmd2-1/settings/dm_levels", [0.5, 0.5]),
        "need 0 <= lowest < highest <= 1 of dm_levels, got 0.5 and 0.5 "
        "(params.yaml: students.dmd2-1.settings.dm_levels)",
    ),
    "gan_levels beyond the grid": (
        lambda raw: raw["students"]["dmd2-1"]["settings"].update(noise_levels=10, gan_levels=11),
        "need gan_levels <= noise_levels, got 11 and 10 "
        "(params.yaml: students.dmd2-1.settings.gan_levels)",
    ),
    "critic continued of the teacher": (
        put("students/dmd2-1/settings/continue_critic", True),
        "need a student of method dmd2, whose critic is continued, got teacher "
        "(params.yaml: students.dmd2-1.init_from)",
    ),
    "critic continued of another method": (
        put("students/dmd2-4/settings/continue_critic", True),
        "need a student of method dmd2, whose critic is continued, got cd "
        "(params.yaml: students.dmd2-4.init_from)",
    ),
    "critic continued that is not saved": (
        lambda raw: (
            put("students/dmd2-4/init_from", "dmd2-1")(raw),
            put("students/dmd2-4/settings/continue_critic", True)(raw),
        ),
        "need save_critic: true, for dmd2-4 continues this critic, got false "
        "(params.yaml: students.dmd2-1.settings.save_critic)",
    ),
    "row of an unknown student": (
        put("rows/cd-4/model", "dc"),
        "need teacher or one of cd, dmd2-1, dmd2-4, got 'dc'; did you mean 'cd'? "
        "(params.yaml: rows.cd-4.model)",
    ),
    "start from an unknown student": (
        put("students/cd/init_from", "dmd2-41"),
        "need teacher, another student or an import, got 'dmd2-41'; did you mean 'dmd2-4'? "
        "(params.yaml: students.cd.init_from)",
    ),
    "start from itself": (
        put("students/dmd2-1/init_from", "dmd2-1"),
        "need init_from without a cycle, got dmd2-1 from dmd2-1 "
        "(params.yaml: students.dmd2-1.init_from)",
    ),
    "churn range upside down": (
        lambda raw: raw["rows"]["cd-4"].update(
            sampler="churn", churn={"S_churn": 1, "S_min": 2.0, "S_max": 1.0, "S_noise": 1}
        ),
        "need S_min <= S_max, got 2.0 and 1.0 (params.yaml: rows.cd-4.churn.S_min)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_one_line(case: str) -> None:
    edit, message = REFUSALS[case]
    assert problems(edit) == [message]


def test_student_named_teacher_is_refused() -> None:
    [line] = problems(lambda raw: raw["students"].update(teacher=raw["students"]["cd"]))
    assert line.endswith("is not 'teacher', got 'teacher'")


def test_misspelt_key_is_one_problem_not_two() -> None:
    def edit(raw: dict[str, Any]) -> None:
        cd = raw["students"]["cd"]
        cd["learning_rate"], cd["init_form"] = cd.pop("lr"), cd.pop("init_from")

    assert problems(edit) == [
        "params.yaml: students.cd: unknown key 'learning_rate'; did you mean 'lr'?",
        "params.yaml: students.cd: unknown key 'init_form'; did you mean 'init_from'?",
    ]


def test_cycle_through_several_students_is_reported_once() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["students"]["cd"]["init_from"] = "dmd2-1"
        raw["students"]["dmd2-1"]["init_from"] = "dmd2-4"
        raw["students"]["dmd2-4"]["init_from"] = "dmd2-1"

    assert problems(edit) == [
        "need init_from without a cycle, got dmd2-1 from dmd2-4 from dmd2-1 "
        "(params.yaml: students.dmd2-1.init_from)"
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
    for part in ("'sead'", "sigma_max", "1.0e-4", "batch_gpu", "'ce'", "metric.features: missing"):
        assert sum(part in line for line in lines) == 1, part


def test_method_that_is_missing_brings_no_flood() -> None:
    assert problems(without("students/cd/method")) == [
        "params.yaml: students.cd.method: missing; need one of denoising, consistency, dmd2: how "
        "it is trained"
    ]


# --- what is only warned about ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "edit"),
    [
        ("cd-4", put("rows/cd-4/guidance_scale", 1.5)),
        ("dmd2-4-guided", put("students/dmd2-4/settings/label_dropout", 0.0)),
        (
            "teacher-heun-7",
            lambda raw: (
                put("teacher/train/settings/label_dropout", 0)(raw),
                put("rows/teacher-heun-7/guidance_scale", 0.0)(raw),
            ),
        ),
    ],
)
def test_guidance_without_label_dropout_is_a_warning(row: str, edit: Edit) -> None:
    with pytest.warns(UserWarning, match=rf"rows\.{row}\.guidance_scale: .* label dropout"):
        load_edited(edit)


def test_guidance_of_a_downloaded_teacher_is_no_warning() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["teacher"] = {"url": "t.safetensors", "sha256": "0a" * 32}
        raw["rows"]["teacher-heun-7"]["guidance_scale"] = 1.5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_edited(edit)


# --- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("metric/features", "dinov2", "need url and sha256 of the weights of dinov2, got nothing"),
        ("metric/inception_score", {"splits": 10}, "need features inception-2015 for an Inception"),
        ("metric/kid/subset_size", 64, "need subset_size <= 63, .* got 64"),
        ("metric/manifold/density_k", 64, "need density_k <= 63, .* got 64"),
        ("metric/memorisation/images", 255, "need images >= reference_images, got 255 and 256"),
        ("metric/memorisation/expected", 1.0, "expected: need .* < 1, got 1.0"),
        ("generate/seed_ranges", 0, "seed_ranges: need an integer >= 1, got 0"),
        ("rows/cd-4/seed_ranges", 0, "cd-4.seed_ranges: need an integer >= 1, got 0"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(
    path: str, value: object, expected: str, tmp_path: Path
) -> None:
    raw = yaml.safe_load((ROOT / "config" / "tiny.yaml").read_text())
    *parents, key = path.split("/")
    block = raw
    for parent in parents:
        block = block[parent]
    block[key] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match=expected):
        load_params(file)


def test_seed_ranges_are_disjoint_and_follow_one_another() -> None:
    g = Generate(images=5, batch=2, first_seed=7, labels="balanced", seed_ranges=3)
    row = Row(model="teacher", sampler="heun", steps=4, guidance_scale=1.0)
    assert g.ranges(row) == [range(7, 12), range(12, 17), range(17, 22)]
    assert replace(g, seed_ranges=None).ranges(row) == [range(7, 12)]


def test_a_row_may_have_other_seed_ranges_than_the_rest() -> None:
    g = Generate(images=5, batch=2, first_seed=7, labels="balanced", seed_ranges=3)
    row = Row(model="teacher", sampler="heun", steps=4, guidance_scale=1.0, seed_ranges=1)
    assert g.ranges(row) == [range(7, 12)]
    assert replace(g, seed_ranges=None).ranges(replace(row, seed_ranges=2))[1] == range(12, 17)


def test_optional_metrics_may_be_absent() -> None:
    assert load_params(ROOT / "config" / "tiny.yaml").metric.inception_score is None
