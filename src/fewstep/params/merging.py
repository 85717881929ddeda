"""The shared keys of `training`, put into each student and into a teacher that is trained.

A student's own key goes before the shared one, and null leaves a shared one out. A block such as
`ema` is replaced whole; `validation` alone is merged key by key, since students share its images
and seeds but not its sampler.
"""

from typing import Any

from fewstep.params.problems import KeyPath

UNSHARED = ("method", "init_from", "settings")  # what makes a student the one it is
BY_KEY = "validation"


def merged(raw: dict[str, Any]) -> dict[str, Any]:
    """Plain params without `training`, whose keys stand in the students and in teacher.train."""
    whole = {key: value for key, value in raw.items() if key != "training"}
    shared, students, teacher = (raw.get(key) for key in ("training", "students", "teacher"))
    if isinstance(shared, dict) and isinstance(students, dict):
        whole["students"] = {name: _over(shared, own) for name, own in students.items()}
    if isinstance(shared, dict) and isinstance(teacher, dict) and "train" in teacher:
        whole["teacher"] = {**teacher, "train": _over(shared, teacher["train"])}
    return whole


def merged_students(raw: dict[str, Any]) -> dict[str, Any]:
    """The merged block of each training by name: the students, and `teacher` if it is trained."""
    whole = merged(raw)
    trained = {"teacher": whole["teacher"]["train"]} if "train" in whole["teacher"] else {}
    return trained | whole["students"]


def home(raw: dict[str, Any], path: KeyPath) -> KeyPath:
    """Where the value at a path of the merged params stands in the file."""
    if path[:1] != ("students",) and path[:2] != ("teacher", "train"):
        return path
    own, shared, key = _get(raw, *path[:2]), _get(raw, "training"), path[2:3]
    if key == (BY_KEY,) and _get(own, BY_KEY):
        own, shared, key = _get(own, BY_KEY), _get(shared, BY_KEY), path[3:4]
    inherited = key and key[0] in shared and key[0] not in own
    missing = type(path[-1]) is str and path[-1] not in _get(raw, "training", *path[2:-1])
    return ("training", *path[2:]) if inherited and not missing else path


def _over(shared: dict[str, Any], own: Any) -> Any:  # noqa: ANN401
    """`own` on top of what is shared; what is no mapping stays, for the schema to refuse."""
    if not isinstance(own, dict):
        return own
    both = {**shared, **own}
    if isinstance(shared.get(BY_KEY), dict) and BY_KEY in own:
        both[BY_KEY] = _over(shared[BY_KEY], own[BY_KEY])
    return {key: value for key, value in both.items() if value is not None or key not in shared}


def _get(block: Any, *path: Any) -> dict[Any, Any]:  # noqa: ANN401
    """The mapping at a path; an empty one where there is none."""
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}
