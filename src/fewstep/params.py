"""params.yaml as frozen dataclasses. Field names are the YAML keys; units are in config/README.md.

Three passes find every problem before anything is built: what YAML itself hides (`_read`), each
value against config/params.schema.yaml (`_check_schema`), values against one another
(`_cross_check`). No field has a default: each number has its one home in params.yaml.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
import reprlib
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

SCHEMA = Path("config/params.schema.yaml")

KeyPath = tuple[Any, ...]


class ParamsError(ValueError):
    """Every problem of a params file, one a line."""


@dataclass(frozen=True)
class Data:
    """Without `workers` as many processes as there are cores; without `on_error` stop; `url` and
    `sha256` go together, for a source that can be fetched."""

    source: str
    resolution: int
    channels: int
    classes: int
    on_error: Literal["stop", "skip"] | None = None
    workers: int | None = None
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Network:
    type: Literal["adm", "ddpmpp"]
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    sigma_data: float


@dataclass(frozen=True)
class Noise:
    sigma_min: float
    sigma_max: float
    rho: float


@dataclass(frozen=True)
class Ema:
    """`kimg` and `rampup` belong to half_life, `std` to power; the others are None."""

    kind: Literal["half_life", "power", "none"]
    kimg: float | None = None
    rampup: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class Phema:
    """Power-function averages kept beside the saved one, for `fewstep phema`."""

    stds: tuple[float, ...]
    snapshot_kimg: float


@dataclass(frozen=True)
class Baseline:
    """How the teacher is sampled for the validation's first value."""

    sampler: Literal["heun", "euler", "ddim"]
    steps: int


@dataclass(frozen=True)
class Validation:
    """Scoring of the averaged student while it trains."""

    every_kimg: float
    images: int
    first_seed: int
    reference_images: int
    sampler: Literal["heun", "euler", "ddim", "renoise"]
    steps: int
    guidance_scale: float
    teacher: Baseline | None = None


@dataclass(frozen=True)
class DenoisingSettings:
    P_mean: float
    P_std: float
    label_dropout: float


@dataclass(frozen=True)
class ConsistencySettings:
    steps: int
    teacher_edges: tuple[int, int]
    anneal_kimg: float
    edges: Literal["uniform", "vp", "edm"]
    terminal_anchor: bool
    terminal_teacher_hop: bool
    sync_dropout: bool
    distance: Literal["huber", "l2", "l2_root", "pseudo_huber"]
    weight: Literal[
        "edm",
        "vlike",
        "flat",
        "uniform",
        "snr",
        "snr+1",
        "karras",
        "sqrt_karras",
        "truncated-snr",
    ]
    uniform_share: float | None = None


@dataclass(frozen=True)
class Dmd2Settings:
    """A switch that is absent is off."""

    steps: int
    backward_simulation: bool
    fake_score_lr: float
    update_ratio: int
    noise_levels: int
    dm_levels: tuple[float, float]
    dm_epsilon: float
    gan_student_weight: float
    gan_critic_weight: float
    gan_levels: int
    gan_groups: int
    label_dropout: float
    shared_label_drop: bool
    teacher_eval: bool
    dm_nan_to_num: bool | None = None
    separate_labels: bool | None = None
    save_critic: bool | None = None
    continue_critic: bool | None = None
    all_stops: bool | None = None


@dataclass(frozen=True)
class Student:
    """A network to train. `settings` is of the class that `method` names; a teacher that is
    trained has no `init_from`. Without `nonfinite_to` a step whose gradient is not finite is left
    out; without `loss_scale` that of fp16 adapts."""

    method: Literal["denoising", "consistency", "dmd2"]
    kimg: float
    batch: int
    batch_gpu: int
    lr: float
    lr_warmup_kimg: float
    lr_schedule: Literal["constant", "linear", "cosine"]
    optimizer: Literal["adamw", "adam", "radam"]
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    max_nonfinite: int
    dropout: float
    ema: Ema
    checkpoint_kimg: float
    keep_checkpoints: int
    settings: DenoisingSettings | ConsistencySettings | Dmd2Settings
    init_from: str | None = None
    dropout_resolutions: tuple[int, ...] | None = None
    nonfinite_to: float | None = None
    loss_scale: float | None = None
    phema: Phema | None = None
    validation: Validation | None = None


@dataclass(frozen=True)
class Teacher:
    """Either `url` and `sha256` are set (a file to download), or `train` is."""

    url: str | None = None
    sha256: str | None = None
    train: Student | None = None


@dataclass(frozen=True)
class Download:
    """A file of someone else: where it is, and its sha256 or `unknown`."""

    url: str
    sha256: str


@dataclass(frozen=True)
class Generate:
    """Without `seed_ranges` there is one range of `images` seeds; a row may say otherwise."""

    images: int
    batch: int
    first_seed: int
    labels: Literal["balanced", "random"]
    seed_ranges: int | None = None

    def ranges(self, row: "Row") -> list[range]:
        """The disjoint ranges of a row's seeds, one behind the other; all rows have the first."""
        count = row.seed_ranges or self.seed_ranges or 1
        starts = (self.first_seed + self.images * i for i in range(count))
        return [range(start, start + self.images) for start in starts]


@dataclass(frozen=True)
class Churn:
    S_churn: float
    S_min: float
    S_max: float
    S_noise: float


@dataclass(frozen=True)
class Row:
    """A row of the results table. `churn` is set exactly when `sampler` is churn; `seed_ranges`
    where generate.seed_ranges is not the row's."""

    model: str
    sampler: Literal["heun", "euler", "ddim", "renoise", "churn"]
    steps: int
    guidance_scale: float
    churn: Churn | None = None
    seed_ranges: int | None = None


@dataclass(frozen=True)
class Sweep:
    """Rows from one block: each of `steps` with each of `guidance_scale`; see `swept_rows`."""

    model: str
    sampler: Literal["heun", "euler", "ddim", "renoise", "churn"]
    steps: tuple[int, ...]
    guidance_scale: tuple[float, ...]
    churn: Churn | None = None
    seed_ranges: int | None = None


@dataclass(frozen=True)
class KidSettings:
    subsets: int
    subset_size: int


@dataclass(frozen=True)
class ManifoldSettings:
    k: int
    density_k: int


@dataclass(frozen=True)
class MemorisationSettings:
    """Without `images` the reference images are looked through."""

    k: int
    expected: float
    images: int | None = None


@dataclass(frozen=True)
class InceptionScoreSettings:
    splits: int


@dataclass(frozen=True)
class Bootstrap:
    """How sure a value from one seed range is, and a difference of two rows."""

    resamples: int
    confidence: float


@dataclass(frozen=True)
class Metric:
    """Each optional block is a further metric; `weights` belong to networks no package brings.

    `reference` is a file of published statistics for the Fréchet distance; without it they come
    from `reference_images` images of the data, as what other metrics compare with always does.
    """

    features: Literal["efficientnet-lite0", "inception-2015", "dinov2", "clip"]
    reference_images: int
    weights: Download | None = None
    reference: Download | None = None
    kid: KidSettings | None = None
    manifold: ManifoldSettings | None = None
    memorisation: MemorisationSettings | None = None
    inception_score: InceptionScoreSettings | None = None
    bootstrap: Bootstrap | None = None


@dataclass(frozen=True)
class Wandb:
    mode: Literal["disabled", "offline", "online"]
    project: str
    entity: str | None = None


@dataclass(frozen=True)
class Tracking:
    """Where a training is shown beside its log; no result depends on it."""

    dvclive: bool
    wandb: Wandb


@dataclass(frozen=True)
class Performance:
    """How networks are computed. Alone in having defaults: none of these decides a result."""

    layout: Literal["channels_last", "contiguous"] = "channels_last"
    attention: Literal["fused", "plain"] = "fused"
    norm: Literal["fused", "plain"] = "fused"
    updates: Literal["fused", "foreach", "loop"] = "fused"
    compile: Literal["none", "blocks", "network"] = "none"
    cuda_graphs: bool = False
    recompute: tuple[int, ...] = ()
    shard: bool = False


@dataclass(frozen=True)
class Params:
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    data: Data
    network: Network
    noise: Noise
    teacher: Teacher
    imports: Mapping[str, Download]
    students: Mapping[str, Student]
    generate: Generate
    rows: Mapping[str, Row]
    metric: Metric
    tracking: Tracking
    sweeps: Mapping[str, Sweep] | None = None
    performance: Performance = Performance()

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that `load_params` would read back as these params."""
        return plain(self)


SETTINGS = {
    "denoising": DenoisingSettings,
    "consistency": ConsistencySettings,
    "dmd2": Dmd2Settings,
}


def load_params(path: str | Path = "params.yaml", swept: bool = True) -> Params:
    """Read, check and freeze a params file.

    Args:
        swept: whether the rows have to be those of the sweeps, as `fewstep sweep` writes them.

    Raises:
        ParamsError: the file cannot be read or some of its values are wrong; names them all.

    Warns:
        UserWarning: a row guides a model that never trained without labels.
    """
    report = _Report(str(path))
    raw = _read(Path(path), report)
    _check_schema(raw, _schema(Path(path)), report)
    _cross_check(raw, report)
    if swept and report.sound("sweeps") and report.sound("rows"):
        _check_sweeps(raw, report)
    if report.lines:
        raise ParamsError("\n".join(dict.fromkeys(report.lines)))
    params = _build(Params, raw)
    for message in _ungrounded_guidance(params):
        warnings.warn(f"{path}: {message}", stacklevel=2)
    return params


def swept_rows(sweeps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the blocks of `sweeps`: `NAME-8`, and `NAME-8-g1p5` of several scales."""
    rows: dict[str, dict[str, Any]] = {}
    for name, sweep in sweeps.items():
        for steps, scale in itertools.product(sweep["steps"], sweep["guidance_scale"]):
            several = len(sweep["guidance_scale"]) > 1
            suffix = f"-g{scale:g}".replace(".", "p") if several else ""  # DVC splits keys at dots
            row = {**sweep, "steps": steps, "guidance_scale": scale}
            rows[f"{name}-{steps}{suffix}"] = row
    return rows


def digest(obj: object) -> str:
    """sha256 of the canonical JSON of dataclasses, mappings, sequences and scalars.

    An optional field that is None counts as absent, so a new one changes no old digest.
    """
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(name: str) -> str:
    """Where in params a training stands: a student's name, or teacher."""
    return "teacher.train" if name == "teacher" else f"students.{name}"


def plain(obj: Any) -> Any:  # noqa: ANN401
    """Dataclasses, mappings and sequences as dicts and lists; optional fields that are None go."""
    if is_dataclass(obj):
        pairs = ((f.name, getattr(obj, f.name)) for f in fields(obj))
        return {name: plain(value) for name, value in pairs if value is not None}
    if isinstance(obj, Mapping):
        return {name: plain(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    return obj


def _build(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """A checked YAML value as `kind`, a dataclass or the type of a dataclass field."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if kind is Student:
            hints["settings"] = SETTINGS[value["method"]]
        return typing.cast(Any, kind)(**{k: _build(hints[k], v) for k, v in value.items()})
    if isinstance(kind, types.UnionType):  # only `X | None` is left here
        return _build(typing.get_args(kind)[0], value)
    if kind in (int, float):  # 48 and 48.0 are one value, with one digest
        return kind(value)
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    if typing.get_origin(kind) is Mapping:
        of = typing.get_args(kind)[1]
        return MappingProxyType({name: _build(of, item) for name, item in value.items()})
    return value


# --- problems ----------------------------------------------------------------------------------


class _Report:
    """Collects problems, and remembers where they are."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []
        self._paths: list[KeyPath] = []

    def refuse(self, path: KeyPath, message: str, at: KeyPath | None = None) -> None:
        """A value at `path` that is wrong on its own; the line shows `at` instead, if given."""
        shown = _dotted(path if at is None else at)
        self.lines.append(": ".join(filter(None, (self.file, shown, message))))
        self._paths.append(path)

    def conflict(self, path: KeyPath, message: str) -> None:
        """A value that is wrong beside another one; `path` is the key to edit."""
        self.lines.append(f"{message} ({self.file}: {_dotted(path)})")

    def sound(self, *path: str) -> bool:
        """Whether nothing on the way to, at or below `path` was refused."""
        return not any(p[: len(path)] == path[: len(p)] for p in self._paths)


def _dotted(path: Iterable[Any]) -> str:
    return "".join(f"[{key}]" if type(key) is int else f".{key}" for key in path).lstrip(".")


def _show(value: object, rule: Mapping[str, Any] = MappingProxyType({})) -> str:
    """`value` as a message quotes it; says that it is a string where `rule` asks for none."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    odd = isinstance(value, str) and rule.get("type", "string") != "string"
    return f"the string {reprlib.repr(value)}" if odd else reprlib.repr(value)


def _nearest(key: object, known: Iterable[str]) -> str | None:
    """The known name most like `key`; its initials come first (lr for learning_rate)."""
    text = str(key)
    initials = "".join(word[:1] for word in re.split("[_. -]", text))
    if initials in (known := list(known)):
        return initials
    return next(iter(difflib.get_close_matches(text, known, n=1, cutoff=0.5)), None)


def _did_you_mean(key: object, known: Iterable[str]) -> str:
    nearest = _nearest(key, known)
    return f"; did you mean '{nearest}'?" if nearest else ""


# --- YAML --------------------------------------------------------------------------------------

_FLOAT = "tag:yaml.org,2002:float"
# What YAML 1.1 (this module, Snakemake) and YAML 1.2 (DVC) read alike: not `on`, `010` or `1_000`.
_ALIKE = {
    "tag:yaml.org,2002:bool": re.compile("true|True|TRUE|false|False|FALSE"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    _FLOAT: re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?"),
}


def _read(path: Path, report: _Report) -> Any:  # noqa: ANN401
    """The file as plain Python values; refuses duplicate keys and values that YAMLs read apart."""
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        root = loader.get_single_node()
        if root is not None:
            _check_nodes(root, (), report, set())
        raw = None if root is None else loader.construct_document(root)
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: no such file; run in the repository's root, or copy a preset from config/"
        ) from None
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ParamsError(f"{path}: not valid YAML: {where}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(raw, dict):
        got = "an empty file" if raw is None else _show(raw)
        raise ParamsError(f"{path}: need a mapping of keys to values, got {got}")
    return raw


def _check_nodes(node: yaml.Node, path: KeyPath, report: _Report, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, which may even lie inside its own anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a mapping as a key: `construct_document` refuses it
            line = key.start_mark.line + 1
            if key.value in lines:
                message = f"key given twice, in lines {lines[key.value]} and {line}"
                report.refuse((*path, key.value), message)
            lines[key.value] = line
            _check_nodes(value, (*path, key.value), report, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_nodes(item, (*path, index), report, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and _is_repr(node.value):
        node.tag = _FLOAT
    elif node.tag in _ALIKE:
        text = node.value
        if not _ALIKE[node.tag].fullmatch(text):
            message = f"YAML 1.1 and 1.2 may read {text} differently; write a finite decimal number"
            report.refuse(path, f"{message}, true or false, or put text in quotes")
        elif node.tag == _FLOAT and not math.isfinite(float(text)):
            report.refuse(path, f"need a finite number, got {text}")


def _is_repr(text: str) -> bool:
    """Whether `text` is Python's way of writing a small or large number, such as 1e-05.

    YAML 1.1 reads that as a string, but `dvc exp run -S` writes it and can write nothing else.
    """
    return re.fullmatch(r"-?[1-9]e[-+][0-9]+", text) is not None and repr(float(text)) == text


# --- each value on its own ---------------------------------------------------------------------


def _schema(path: Path) -> dict[str, Any]:
    """The schema of this checkout, else the one in or beside the folder of the params file."""
    homes = (Path(__file__).parents[2], path.parent, path.parent.parent)
    for file in (home / SCHEMA for home in homes):
        if file.is_file():
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster
            return yaml.load(file.read_bytes(), loader)
    raise ParamsError(f"{path}: need {SCHEMA} in the repository that holds it, found none")


def _check_schema(raw: Any, schema: dict[str, Any], report: _Report) -> None:  # noqa: ANN401
    """Reports each value that breaks a rule of the schema."""
    from jsonschema import Draft202012Validator  # 0.1 s that `fewstep --help` need not pay

    errors = list(Draft202012Validator(schema).iter_errors(raw))
    misspelt: set[KeyPath] = set()
    for error in errors:
        if error.validator == "additionalProperties":
            path, known = tuple(error.absolute_path), typing.cast(Any, error.schema)["properties"]
            for key in [key for key in error.instance if key not in known]:
                hint = _did_you_mean(key, known) or f"; known keys: {', '.join(known)}"
                report.refuse((*path, key), f"unknown key '{key}'{hint}", at=path)
                misspelt.add((*path, _nearest(key, known)))
    for error in errors:
        path, value = tuple(error.absolute_path), error.instance
        rule = typing.cast(dict[str, Any], error.schema)
        if error.validator == "required":
            missing = [key for key in rule["required"] if key not in value]
            for key in [key for key in missing if (*path, key) not in misspelt]:
                of = _resolve(rule["properties"][key], schema)
                report.refuse((*path, key), f"missing; need {_need(of)}: {of['description']}")
        elif error.validator != "additionalProperties":
            is_key = "propertyNames" in error.absolute_schema_path
            message = f"need {_need(rule)}, got {_show(value, rule)}{_repair(value, rule)}"
            report.refuse((*path, value) if is_key else path, message, at=path)


def _resolve(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A rule with its `$ref`, if it has one, followed."""
    name = rule.get("$ref", "").rpartition("/")[2]
    return {**schema["$defs"][name], **rule} if name else rule


def _need(rule: dict[str, Any]) -> str:
    """What a rule of the schema asks for, in words."""
    if "title" in rule:
        return rule["title"]
    if "enum" in rule:
        return "one of " + ", ".join(rule["enum"])
    nouns = {
        "boolean": "true or false",
        "integer": "an integer",
        "number": "a number",
        "object": "a mapping",
        "string": "a string",
    }
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {rule[bound]}" for bound, sign in bounds.items() if bound in rule]
    return " ".join(filter(None, (nouns[rule["type"]], " and ".join(limits))))


def _repair(value: object, rule: dict[str, Any]) -> str:
    """How to write `value` so that it passes `rule`, where that can be guessed."""
    if rule.get("type") == "string" and isinstance(value, int | float):
        return "; put it in quotes"
    if not isinstance(value, str):
        return ""
    if "enum" in rule:
        return _did_you_mean(value, rule["enum"])
    number = re.fullmatch(r"([-+]?[0-9]+)(\.[0-9]*)?(?:[eE]([-+]?)([0-9]+))?", value)
    if number is None or rule.get("type") not in ("integer", "number"):
        return ""
    if rule["type"] == "integer":
        return f"; write {float(value):.0f}" if float(value).is_integer() else ""
    whole, fraction, sign, exponent = number.groups()
    if exponent is None:
        return f"; write {value}"
    # YAML 1.1 reads a number with an exponent only where it has a point and a sign.
    return f"; write {whole}{fraction or '.0'}e{sign or '+'}{exponent}"


# --- values against one another ----------------------------------------------------------------


def _cross_check(raw: dict[str, Any], report: _Report) -> None:
    """Conflicts between values that are sound on their own."""
    if report.sound("noise"):
        low, high = raw["noise"]["sigma_min"], raw["noise"]["sigma_max"]
        if not low < high:
            message = f"need sigma_min < sigma_max, got {low} and {high}"
            report.conflict(("noise", "sigma_min"), message)
    if report.sound("data", "resolution") and report.sound("network", "channel_mult"):
        resolution, levels = raw["data"]["resolution"], len(raw["network"]["channel_mult"])
        if resolution % (factor := 2 ** (levels - 1)):
            message = f"need resolution divisible by {factor} for {levels} levels of channel_mult"
            report.conflict(("data", "resolution"), f"{message}, got {resolution}")
    if report.sound("metric"):
        _check_metric(raw["metric"], report)
        if report.sound("generate"):
            _check_counts(raw["metric"], raw["generate"]["images"], report)
    if report.sound("teacher") and "train" in raw["teacher"]:
        _check_student(raw["teacher"]["train"], ("teacher", "train"), report)

    if not isinstance(raw.get("students"), dict):
        return
    students = {k: v for k, v in raw["students"].items() if report.sound("students", k)}
    for name, student in students.items():
        _check_student(student, ("students", name), report)
    imports = raw["imports"] if report.sound("imports") else {}
    names = ["teacher", *map(str, raw["students"]), *map(str, imports)]
    for name in set(imports) & set(raw["students"]):
        report.conflict(("imports", name), f"need another name than the student's, got {name}")
    init_from = {name: student["init_from"] for name, student in students.items()}
    for name, model in init_from.items():
        if model not in names:
            hint = _did_you_mean(model, [other for other in names if other != name])
            message = f"need teacher, another student or an import, got {_show(model)}{hint}"
            report.conflict(("students", name, "init_from"), message)
    for name, student in students.items():
        if student["settings"].get("continue_critic") and report.sound("students", init_from[name]):
            _check_continued(name, students, report)
    for cycle in _cycles(init_from):
        message = f"need init_from without a cycle, got {' from '.join([*cycle, cycle[0]])}"
        report.conflict(("students", cycle[0], "init_from"), message)
    if isinstance(raw.get("rows"), dict):
        for name, row in raw["rows"].items():
            if report.sound("rows", name):
                _check_row(row, ("rows", name), names, report)


def _check_student(student: dict[str, Any], path: KeyPath, report: _Report) -> None:
    batch, batch_gpu, settings = student["batch"], student["batch_gpu"], student["settings"]
    if batch % batch_gpu:
        below = next(n for n in range(min(batch_gpu, batch), 0, -1) if batch % n == 0)
        above = next((n for n in range(batch_gpu, batch + 1) if batch % n == 0), None)
        would = f"{below} or {above}" if above else f"{below}"
        message = f"need batch divisible by batch_gpu, got {batch} and {batch_gpu}"
        report.conflict((*path, "batch_gpu"), f"{message}; a batch_gpu of {would} would do")
    if student["method"] == "consistency":
        start, end = settings["teacher_edges"]
        if not start <= end:
            message = f"need start <= end of teacher_edges, got {start} and {end}"
            report.conflict((*path, "settings", "teacher_edges"), message)
    if student["method"] == "dmd2":
        low, high = settings["dm_levels"]
        if not low < high:
            message = f"need 0 <= lowest < highest <= 1 of dm_levels, got {low} and {high}"
            report.conflict((*path, "settings", "dm_levels"), message)
        if (gan := settings["gan_levels"]) > (levels := settings["noise_levels"]):
            message = f"need gan_levels <= noise_levels, got {gan} and {levels}"
            report.conflict((*path, "settings", "gan_levels"), message)
        if settings["gan_student_weight"] and not settings["gan_critic_weight"]:
            message = "need gan_critic_weight > 0 beside a gan_student_weight > 0, got 0"
            report.conflict((*path, "settings", "gan_critic_weight"), message)


def _check_continued(name: str, students: dict[str, Any], report: _Report) -> None:
    """The student that this one starts from saves the critic that is continued."""
    model = students[name]["init_from"]
    if model not in students or students[model]["method"] != "dmd2":
        message = f"need a student of method dmd2, whose critic is continued, got {model}"
        report.conflict(("students", name, "init_from"), message)
    elif not students[model]["settings"].get("save_critic"):
        message = f"need save_critic: true, for {name} continues this critic, got false"
        report.conflict(("students", model, "settings", "save_critic"), message)


def _check_metric(metric: dict[str, Any], report: _Report) -> None:
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


def _check_counts(metric: dict[str, Any], images: int, report: _Report) -> None:
    """Metrics that need more images than a row or the reference has."""
    fewest = min(images, metric["reference_images"])
    limits = [
        ("kid", "subset_size", fewest - 1, "images of a row, or real ones, less one"),
        ("manifold", "k", fewest - 1, "images of a row, or real ones, less one"),
        ("manifold", "density_k", fewest - 1, "images of a row, or real ones, less one"),
        ("memorisation", "k", metric["reference_images"] - 1, "real images less one"),
        ("inception_score", "splits", images, "images of a row"),
    ]
    for block, key, most, what in limits:
        if (value := metric.get(block, {}).get(key, 0)) > most:
            message = f"need {key} <= {most}, the {what}, got {value}"
            report.conflict(("metric", block, key), message)


def _check_sweeps(raw: dict[str, Any], report: _Report) -> None:
    sweeps, rows = raw.get("sweeps", {}), raw["rows"]
    wanted = swept_rows(sweeps)
    for name in sweeps:
        mine = {row for row in {*wanted, *rows} if row.startswith(f"{name}-")}
        odd = sorted(row for row in mine if wanted.get(row) != rows.get(row))
        if odd:
            message = f"need the rows of this sweep under rows, got others for {', '.join(odd)}"
            report.conflict(("sweeps", name), f"{message}; write them with `fewstep sweep`")


def _check_row(row: dict[str, Any], path: KeyPath, names: list[str], report: _Report) -> None:
    if (model := row["model"]) not in names:
        known = f"teacher or one of {', '.join(names[1:])}" if names[1:] else "teacher"
        message = f"need {known}, got {_show(model)}{_did_you_mean(model, names)}"
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


def _ungrounded_guidance(params: Params) -> Iterator[str]:
    """Guidance needs an unconditional branch; only label dropout trains one."""
    trained = {"teacher": params.teacher.train, **params.students}
    for name, row in params.rows.items():
        model = trained.get(row.model)
        if row.guidance_scale == 1 or model is None:  # nobody knows how a download was trained
            continue
        if isinstance(model.settings, ConsistencySettings) or model.settings.label_dropout == 0:
            yield (
                f"rows.{name}.guidance_scale: {row.guidance_scale} guides {row.model}, which is "
                "trained without label dropout: its unconditional branch means nothing"
            )
