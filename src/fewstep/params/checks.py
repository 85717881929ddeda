"""Conflicts between values that are sound on their own, in several blocks or one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from fewstep.params.blocks import Noise, Params
from fewstep.params.problems import KeyPath, Report, did_you_mean, show
from fewstep.params.sweeps import swept_rows
from fewstep.params.training import Student
from fewstep.params.values import key_of
from fewstep.paths import BEST, trained


def check_conflicts(raw: dict[str, Any], report: Report) -> None:
    """Report conflicts in merged params, between blocks in which nothing was refused."""
    if report.sound("noise"):
        _check_noise(raw["noise"], report)
    if report.sound("data", "resolution") and report.sound("network"):
        _check_levels(raw["data"]["resolution"], raw["network"], report)
    if report.sound("metric"):
        _check_metric(raw["metric"], report)
        if report.sound("generate"):
            _check_counts(raw["metric"], raw["generate"]["images"], report)
    if report.sound("data"):
        _check_class_names(raw["data"], report)
    if report.sound("data", "classes") and report.sound("rows"):
        _check_guidance(raw["data"]["classes"], raw["rows"], report)
    _check_checksums(raw, report)
    if report.sound("teacher") and "train" in raw["teacher"]:
        _check_student("teacher", _student(raw["teacher"]["train"]), report)
    if isinstance(raw.get("students"), dict):
        if report.sound("noise"):
            _check_grids(raw, report)
        imports = raw["imports"] if report.sound("imports") else {}
        names = ["teacher", *map(str, raw["students"]), *map(str, imports)]
        _check_students(raw["students"], imports, names, report)
        _check_rows(raw.get("rows"), names, _trainings(raw, report), report)


def check_sweeps(raw: dict[str, Any], report: Report) -> None:
    """Report sweeps whose rows are not those that `fewstep sweep` would write."""
    if not (report.sound("sweeps") and report.sound("rows")):
        return
    sweeps, rows = raw.get("sweeps", {}), raw["rows"]
    wanted = swept_rows(sweeps)
    for name in sweeps:
        mine = {row for row in {*wanted, *rows} if row.startswith(f"{name}-")}
        odd = sorted(row for row in mine if wanted.get(row) != rows.get(row))
        if odd:
            message = f"need the rows of this sweep under rows, got others for {', '.join(odd)}"
            report.conflict(("sweeps", name), f"{message}; write them with `fewstep sweep`")


def ungrounded_guidance(params: Params) -> Iterator[str]:
    """Warnings of rows that guide without an unconditional branch; label dropout trains one."""
    blocks = {"teacher": params.teacher.train, **params.students}
    for name, row in params.rows.items():
        model = blocks.get(trained(row.model))
        if row.guidance_scale == 1 or model is None:  # nobody knows how a download was trained
            continue
        if not model.settings.trains_unconditional:
            yield (
                f"rows.{name}.guidance_scale: {row.guidance_scale} guides {row.model}, which is "
                "trained without label dropout: its unconditional branch means nothing"
            )


def _check_checksums(raw: dict[str, Any], report: Report) -> None:
    """Refuse weights at an address without a checksum: tomorrow they may be others."""
    files = {("teacher",): raw["teacher"]} if report.sound("teacher") else {}
    if report.sound("imports"):
        files |= {("imports", name): file for name, file in raw["imports"].items()}
    for path, file in files.items():
        if re.match("https?://", file.get("url", "")) and "sha256" not in file:
            message = "need the sha256 of a file at an address, 64 hex digits or unknown"
            report.conflict((*path, "sha256"), f"{message}, got no such key")


def _check_class_names(data: Mapping[str, Any], report: Report) -> None:
    """Refuse another number of names than classes, and two classes of one name."""
    names = data.get("class_names")
    if names is not None and not len(names) == len(set(names)) == data["classes"]:
        message = f"need {data['classes']} different names, as many as data.classes"
        report.conflict(("data", "class_names"), f"{message}, got {show(names)}")


def _check_guidance(classes: int, rows: Mapping[str, Any], report: Report) -> None:
    """Refuse to guide by labels that there are none of."""
    for name, row in rows.items():
        if classes == 0 and row["guidance_scale"] != 1:
            message = "need guidance_scale 1 where data.classes is 0, which leaves nothing to guide"
            path = ("rows", name, "guidance_scale")
            report.conflict(path, f"{message} by, got {row['guidance_scale']}")


def _student(raw: dict[str, Any]) -> Student:
    return TypeAdapter(Student).validate_python(raw)


def _check_noise(noise: dict[str, Any], report: Report) -> None:
    low, high = noise["sigma_min"], noise["sigma_max"]
    if not low < high:
        message = f"need sigma_min < sigma_max, got {low} and {high}"
        report.conflict(("noise", "sigma_min"), message)


def _check_grids(raw: dict[str, Any], report: Report) -> None:
    noise = Noise(**raw["noise"])
    if not noise.sigma_min < noise.sigma_max:
        return  # said already
    for name, block in raw["students"].items():
        if report.sound("students", name):
            grid = _student(block).settings.grid(noise)
            if not grid.sigma_min < grid.sigma_max:
                message = "need sigma_min < sigma_max of the student's steps, noise's where absent"
                got = f"got {grid.sigma_min:g} and {grid.sigma_max:g}"
                report.conflict(("students", name, "settings", "sigma_max"), f"{message}, {got}")


def _check_levels(resolution: int, network: dict[str, Any], report: Report) -> None:
    levels = [resolution >> level for level in range(len(network["channel_mult"]))]
    if resolution % (factor := 2 ** (len(levels) - 1)):
        message = f"need resolution divisible by {factor} for {len(levels)} levels of channel_mult"
        report.conflict(("data", "resolution"), f"{message}, got {resolution}")
    elif odd := [n for n in network["attn_resolutions"] if n not in levels]:
        known, got = (", ".join(map(str, numbers)) for numbers in (levels, odd))
        message = f"need attn_resolutions of the levels {known}, got {got}"
        report.conflict(("network", "attn_resolutions"), message)


def _check_student(name: str, student: Student, report: Report) -> None:
    batch, batch_gpu = student.batch, student.batch_gpu
    path = ("teacher", "train") if name == "teacher" else ("students", name)
    if (student.lr_schedule == "inverse_sqrt") != (student.lr_ref_kimg is not None):
        message = "need lr_ref_kimg with lr_schedule: inverse_sqrt and without any other, got "
        got = f"{show(student.lr_ref_kimg)} with {student.lr_schedule}"
        report.conflict((*path, "lr_ref_kimg"), message + got)
    if batch % batch_gpu:
        below = next(n for n in range(min(batch_gpu, batch), 0, -1) if batch % n == 0)
        above = next((n for n in range(batch_gpu, batch + 1) if batch % n == 0), None)
        would = f"{below} or {above}" if above else f"{below}"
        message = f"need batch divisible by batch_gpu, got {batch} and {batch_gpu}"
        report.conflict((*path, "batch_gpu"), f"{message}; a batch_gpu of {would} would do")
    for key, message in student.settings.check(f"{key_of(name)}.settings"):
        report.conflict(key, message)


def _check_students(
    blocks: Mapping[Any, Any], imports: Mapping[Any, Any], names: list[str], report: Report
) -> None:
    sound = {k: _student(v) for k, v in blocks.items() if report.sound("students", k)}
    for name, student in sound.items():
        _check_student(name, student, report)
    for name in set(imports) & set(blocks):
        report.conflict(("imports", name), f"need another name than the student's, got {name}")
    init_from = {name: str(student.init_from) for name, student in sound.items()}
    for name, model in init_from.items():
        if model not in names:
            hint = did_you_mean(model, [other for other in names if other != name])
            hint = f"; {BEST} is for rows alone" if trained(model) in names else hint
            message = f"need teacher, another student or an import, got {show(model)}{hint}"
            report.conflict(("students", name, "init_from"), message)
    for name, student in sound.items():
        if report.sound("students", origin := init_from[name]):
            of = sound[origin].settings if origin in sound else None
            for key, message in student.settings.check_origin(name, origin, of):
                report.conflict(key, message)
    for cycle in _cycles(init_from):
        message = f"need init_from without a cycle, got {' from '.join([*cycle, cycle[0]])}"
        report.conflict(("students", cycle[0], "init_from"), message)


def _check_metric(metric: dict[str, Any], report: Report) -> None:
    features = metric["features"]
    if features != "efficientnet-lite0" and "weights" not in metric:
        message = f"need url and sha256 of the weights of {features}, got nothing"
        report.conflict(("metric", "weights"), message)
    if "inception_score" in metric and features != "inception-2015":
        message = f"need features inception-2015 for an Inception Score, got {features}"
        report.conflict(("metric", "inception_score"), message)
    if (looked := metric.get("memorisation", {}).get("images")) is not None:
        if looked < (reference := metric["reference_images"]):
            message = f"need images >= reference_images, got {looked} and {reference}"
            report.conflict(("metric", "memorisation", "images"), message)


def _check_counts(metric: dict[str, Any], images: int, report: Report) -> None:
    """Metrics that need more images than a row or the reference has."""
    # a subset of KID has 2 images and leaves one out; a covariance and a neighbour need 2
    what, least = ("the smallest KID", 3) if "kid" in metric else ("a distance", 2)
    reference = metric["reference_images"]
    counts = [(("generate", "images"), images), (("metric", "reference_images"), reference)]
    if few := [(key, count) for key, count in counts if count < least]:
        for key, count in few:  # one demand that can be met, not one of each metric that cannot
            report.conflict(key, f"need {key[1]} >= {least} for {what}, got {count}")
        return
    fewest = min(images, reference)
    limits = [
        ("kid", "subset_size", fewest - 1, "images of a row, or real ones, less one"),
        ("manifold", "k", fewest - 1, "images of a row, or real ones, less one"),
        ("manifold", "density_k", fewest - 1, "images of a row, or real ones, less one"),
        ("memorisation", "k", reference - 1, "real images less one"),
        ("inception_score", "splits", images, "images of a row"),
    ]
    for block, key, most, what in limits:
        if (value := metric.get(block, {}).get(key, 0)) > most:
            message = f"need {key} <= {most}, the {what}, got {value}"
            report.conflict(("metric", block, key), message)


def _trainings(raw: dict[str, Any], report: Report) -> dict[str, Any]:
    """The block of each training; None of one in which something was refused."""
    students = {k: v if report.sound("students", k) else None for k, v in raw["students"].items()}
    teacher = raw["teacher"] if report.sound("teacher") else {"train": None}
    return {**({"teacher": teacher["train"]} if "train" in teacher else {}), **students}


def _check_rows(
    rows: object, names: list[str], trainings: Mapping[str, Any], report: Report
) -> None:
    for name, row in rows.items() if isinstance(rows, dict) else ():
        if report.sound("rows", name):
            _check_row(row, ("rows", name), names, report)
            _check_best(row["model"], ("rows", name, "model"), names, trainings, report)


def _check_best(
    model: str, path: KeyPath, names: list[str], trainings: Mapping[str, Any], report: Report
) -> None:
    """Report a `NAME@best` of what has no validation, which is to choose it."""
    name = trained(model)
    if name == model or name not in names:
        return
    if name not in trainings:
        message = f"need a training for {BEST}, got {name}, which is downloaded"
        report.conflict(path, message)
    elif trainings[name] is not None and "validation" not in trainings[name]:
        message = f"need {key_of(name)}.validation to choose {model}, got none"
        report.conflict(path, message)


def _check_row(row: dict[str, Any], path: KeyPath, names: list[str], report: Report) -> None:
    if trained(model := row["model"]) not in names:
        known = f"teacher or one of {', '.join(names[1:])}" if names[1:] else "teacher"
        choices = [*names, *(f"{name}{BEST}" for name in names if "@" in model)]
        message = f"need {known}, got {show(model)}{did_you_mean(model, choices)}"
        report.conflict((*path, "model"), message)
    if "churn" in row and row["churn"]["S_min"] > row["churn"]["S_max"]:
        message = f"need S_min <= S_max, got {row['churn']['S_min']} and {row['churn']['S_max']}"
        report.conflict((*path, "churn", "S_min"), message)


def _cycles(init_from: dict[str, str]) -> Iterator[list[str]]:
    """Each ring of students that start from one another, once."""
    done: set[str] = set()
    for name in init_from:
        chain: list[str] = []
        while name in init_from and name not in done:
            done.add(name)
            chain.append(name)
            name = init_from[name]
        if name in chain:
            yield chain[chain.index(name) :]
