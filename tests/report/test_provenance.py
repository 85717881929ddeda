"""Where a result came from: the commit, marked when edited, and the machine that computed it."""

import subprocess
from pathlib import Path

import pytest

from fewstep.files import write_json
from fewstep.report import provenance


def test_a_commit_with_edits_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FEWSTEP_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("FEWSTEP_COMMIT", "")
    assert provenance.commit() is None, "an image that was built without saying it"
    monkeypatch.setenv("FEWSTEP_COMMIT", "0" * 40)
    assert provenance.commit() == "0" * 40
    for name in ("file", "dvc.lock"):
        Path(name).write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    clean = provenance.commit()
    assert clean is not None and len(clean) == 40
    Path("dvc.lock").write_text("2")
    assert provenance.commit() == clean, "which a run itself writes"
    Path("file").write_text("2")
    assert provenance.commit() == clean + "+"


def test_another_repository_around_the_folder_gives_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the sources are unpacked below a home folder that is kept in git."""
    monkeypatch.delenv("FEWSTEP_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "unpacked"
    inner.mkdir()
    assert provenance.this_run()["no_commit"].startswith("unknown: no git here")
    subprocess.run(["git", "init", "-q"], check=True)
    assert provenance.this_run()["no_commit"].startswith("unknown: nothing was committed yet")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, "commit", "-qm", "x", "--allow-empty"], check=True)
    assert "no_commit" not in provenance.this_run()
    monkeypatch.chdir(inner)
    run = provenance.this_run()
    assert run["commit"] is None and "only of one around it" in run["no_commit"]
    monkeypatch.setenv("FEWSTEP_COMMIT", "0" * 40)
    assert provenance.this_run()["commit"] == "0" * 40


def test_a_worktree_and_a_link_to_the_folder_have_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, tree = tmp_path / "main", tmp_path / "tree"
    main.mkdir()
    monkeypatch.chdir(main)
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (
        ["init", "-q"],
        [*identity, "commit", "-qm", "x", "--allow-empty"],
        ["worktree", "add", "-q", str(tree)],
    ):
        subprocess.run(["git", *command], check=True)
    expected = provenance.commit()
    (tmp_path / "link").symlink_to(tree)
    for folder in (tree, tmp_path / "link"):
        monkeypatch.chdir(folder)
        assert provenance.commit() == expected and expected is not None


def test_a_result_that_came_from_elsewhere_has_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json("score.json", {"value": 1})
    assert provenance.recall("row", Path("score.json")) is None
    provenance.remember("row", Path("score.json"))
    known = provenance.recall("row", Path("score.json"))
    assert known is not None and known["hardware"]["cores"] >= 1 and known["versions"]["torch"]
    write_json("score.json", {"value": 2})
    assert provenance.recall("row", Path("score.json")) is None
