"""Values that are sound alone and wrong beside others."""

import warnings
from typing import Any

import pytest

from fewstep.params import ParamsError
from params_edits import Edit, load_edited, problems, put

REFUSALS: dict[str, tuple[Edit, str]] = {
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
    "fewer names than classes": (
        put("data/class_names", ["a", "b"]),
        "need 10 different names, as many as data.classes, got ['a', 'b'] "
        "(params.yaml: data.class_names)",
    ),
    "two classes of one name": (
        put("data/class_names", [*"abcdefghh", "i"]),
        "need 10 different names, as many as data.classes, got ['a', 'b', 'c', 'd', 'e', 'f', ...] "
        "(params.yaml: data.class_names)",
    ),
    "attention at no level": (
        put("network/attn_resolutions", [8, 4]),
        "need attn_resolutions of the levels 16, 8, got 4 (params.yaml: network.attn_resolutions)",
    ),
    "one image a row, which no metric can do with": (
        put("generate/images", 1),
        "need images >= 3 for the smallest KID, got 1 (params.yaml: generate.images)",
    ),
    "own steps of an import": (
        lambda raw: (
            raw.update(imports={"theirs": {"url": "t.safetensors", "sha256": "0a" * 32}}),
            raw["rows"]["cd-4"].update(model="theirs", steps="own"),
        ),
        "need a number of steps for an import, whose own stand in its file, got own "
        "(params.yaml: rows.cd-4.steps)",
    ),
    "inverse_sqrt of nothing": (
        put("students/cd/lr_schedule", "inverse_sqrt"),
        "need lr_ref_kimg with lr_schedule: inverse_sqrt and without any other, got nothing with "
        "inverse_sqrt (params.yaml: students.cd.lr_ref_kimg)",
    ),
    "lr_ref_kimg of another schedule": (
        put("students/cd/lr_ref_kimg", 3.0),
        "need lr_ref_kimg with lr_schedule: inverse_sqrt and without any other, got 3.0 with "
        "linear (params.yaml: students.cd.lr_ref_kimg)",
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
        "need start <= end in teacher_edges, got 16 and 8 "
        "(params.yaml: students.cd.settings.teacher_edges)",
    ),
    "a student's steps that rise": (
        put("students/mm-2/settings/sigma_max", 0.001),
        "need sigma_min < sigma_max of the student's steps, noise's where absent, got 0.002 and "
        "0.001 (params.yaml: students.mm-2.settings.sigma_max)",
    ),
    "too many steps of moment matching": (
        put("students/mm-2/settings/steps", 17),
        "need at most 16 steps, got 17 (params.yaml: students.mm-2.settings.steps)",
    ),
    "real_share of a single step": (
        put("students/dmd2-1/settings/real_share", 0.5),
        "need backward_simulation and several steps for a real_share, got steps of 1 without "
        "(params.yaml: students.dmd2-1.settings.real_share)",
    ),
    "empty dm_levels": (
        put("students/dmd2-1/settings/dm_levels", [0.5, 0.5]),
        "need 0 <= lowest < highest <= 1 in dm_levels, got 0.5 and 0.5 "
        "(params.yaml: students.dmd2-1.settings.dm_levels)",
    ),
    "gan_levels beyond the grid": (
        lambda raw: raw["students"]["dmd2-1"]["settings"].update(noise_levels=10, gan_levels=11),
        "need gan_levels <= noise_levels, got 11 and 10 "
        "(params.yaml: students.dmd2-1.settings.gan_levels)",
    ),
    "critic continued of the teacher": (
        put("students/dmd2-1/settings/continue_critic", True),
        "need a student of method dmd2, to continue its critic, got teacher "
        "(params.yaml: students.dmd2-1.init_from)",
    ),
    "critic continued of another method": (
        put("students/dmd2-4/settings/continue_critic", True),
        "need a student of method dmd2, to continue its critic, got cd "
        "(params.yaml: students.dmd2-4.init_from)",
    ),
    "critic continued that is not saved": (
        lambda raw: (
            put("students/dmd2-4/init_from", "dmd2-1")(raw),
            put("students/dmd2-4/settings/continue_critic", True)(raw),
        ),
        "need save_critic: true, because dmd2-4 continues this critic, got false "
        "(params.yaml: students.dmd2-1.settings.save_critic)",
    ),
    "row of an unknown student": (
        put("rows/cd-4/model", "dc"),
        "need teacher or one of cd, dmd2-1, dmd2-4, mm-2, got 'dc'; did you mean 'cd'? "
        "(params.yaml: rows.cd-4.model)",
    ),
    "best of an unknown student": (
        put("rows/cd-4/model", "dc@best"),
        "need teacher or one of cd, dmd2-1, dmd2-4, mm-2, got 'dc@best'; did you mean 'cd@best'? "
        "(params.yaml: rows.cd-4.model)",
    ),
    "something else than the best": (
        put("rows/cd-4/model", "cd@last"),
        "need teacher or one of cd, dmd2-1, dmd2-4, mm-2, got 'cd@last'; did you mean 'cd@best'? "
        "(params.yaml: rows.cd-4.model)",
    ),
    "best of a student without validation": (
        put("rows/cd-4/model", "dmd2-1@best"),
        "need students.dmd2-1.validation to choose dmd2-1@best, got none "
        "(params.yaml: rows.cd-4.model)",
    ),
    "best of a trained teacher without validation": (
        put("rows/cd-4/model", "teacher@best"),
        "need teacher.train.validation to choose teacher@best, got none "
        "(params.yaml: rows.cd-4.model)",
    ),
    "best of a downloaded teacher": (
        lambda raw: (
            raw.update(teacher={"url": "t.safetensors", "sha256": "0a" * 32}),
            put("rows/cd-4/model", "teacher@best")(raw),
        ),
        "need a training for @best, got teacher, which is downloaded "
        "(params.yaml: rows.cd-4.model)",
    ),
    "best of an import": (
        lambda raw: (
            raw.update(imports={"theirs": {"url": "t.safetensors", "sha256": "0a" * 32}}),
            put("rows/cd-4/model", "theirs@best")(raw),
        ),
        "need a training for @best, got theirs, which is downloaded (params.yaml: rows.cd-4.model)",
    ),
    "start from the best of another": (
        put("students/dmd2-4/init_from", "cd@best"),
        "need teacher, another student or an import, got 'cd@best'; @best is for rows "
        "alone (params.yaml: students.dmd2-4.init_from)",
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


def test_cycle_through_several_students_is_reported_once() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["students"]["cd"]["init_from"] = "dmd2-1"
        raw["students"]["dmd2-1"]["init_from"] = "dmd2-4"
        raw["students"]["dmd2-4"]["init_from"] = "dmd2-1"

    assert problems(edit) == [
        "need init_from without a cycle, got dmd2-1 from dmd2-4 from dmd2-1 "
        "(params.yaml: students.dmd2-1.init_from)"
    ]


def test_a_teacher_that_is_validated_has_a_best_model() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["teacher"]["train"]["validation"] = raw["students"]["cd"]["validation"]
        raw["rows"]["cd-4"]["model"] = "teacher@best"

    assert load_edited(edit).rows["cd-4"].model == "teacher@best"


@pytest.mark.parametrize(
    ("row", "edit"),
    [
        ("cd-4", put("rows/cd-4/guidance_scale", 1.5)),
        ("cd-4-best", put("rows/cd-4-best/guidance_scale", 1.5)),
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


def test_own_steps_are_those_of_the_settings() -> None:
    def edit(raw: dict[str, Any]) -> None:
        for row in raw["rows"].values():
            row["steps"] = "own"
        raw["students"]["cd"]["settings"]["steps"] = 3
        raw["students"]["cd"]["validation"]["steps"] = "own"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = load_edited(edit)
    drawn = {name: row.steps for name, row in params.rows.items()}
    assert drawn["cd-4"] == drawn["cd-4-best"] == 3
    assert drawn["teacher-heun-7"] == 18 and drawn["mm-2"] == 2 and drawn["dmd2-1"] == 1
    validation = params.students["cd"].validation
    assert validation is not None and validation.steps == 3


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (put("rows/cd-4/steps", 2), "rows.cd-4.steps: 2 steps of cd, which is trained for 4"),
        (
            put("students/cd/validation/steps", 8),
            "students.cd.validation.steps: 8 steps of cd, which is trained for 4",
        ),
    ],
)
def test_other_steps_than_those_trained_for_are_a_warning(edit: Edit, where: str) -> None:
    with pytest.warns(UserWarning, match=where):
        load_edited(edit)


def test_guidance_of_a_downloaded_teacher_is_no_warning() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["teacher"] = {"url": "t.safetensors", "sha256": "0a" * 32}
        raw["rows"]["teacher-heun-7"]["guidance_scale"] = 1.5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_edited(edit)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("metric/features", "dinov2", "need url and sha256 of the weights of dinov2, got nothing"),
        ("metric/inception_score", {"splits": 10}, "need features inception-2015 for an Inception"),
        ("metric/kid/subset_size", 64, "need subset_size <= 63, .* got 64"),
        ("metric/manifold/density_k", 64, "need density_k <= 63, .* got 64"),
        ("metric/memorisation/images", 255, "need images >= reference_images, got 255 and 256"),
        ("metric/memorisation/expected", 1.0, "need .* < 1, got 1.0 .*expected"),
        ("generate/seed_ranges", 0, "need an integer >= 1, got 0 .*seed_ranges"),
        ("rows/cd-4/seed_ranges", 0, "need an integer >= 1, got 0 .*cd-4.seed_ranges"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(
    path: str, value: object, expected: str
) -> None:
    with pytest.raises(ParamsError, match=expected):
        load_edited(put(path, value))
