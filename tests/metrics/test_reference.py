"""Published reference statistics: from a server to every result; refusals; columns apart."""

import csv
import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import EDM
from experiment import set_up, tiny_params
from extraction import features_of as extracted
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.download import downloads
from fewstep.files import read_json, sha256_file
from fewstep.metrics.features import load_features
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats
from fewstep.metrics.published import published_stats
from fewstep.metrics.reference import load_reference, real_images
from fewstep.params import Download, Params, Validation
from fewstep.paths import DATA, MODELS, STATS_ABOUT
from fewstep.stages import download_all, fid, generate, ref_stats, results_table
from fewstep.training.log import Log
from fewstep.training.validation import Validator

ROW = "teacher-euler-4"
DIM = 112  # of EfficientNet-Lite0
pytestmark = pytest.mark.filterwarnings("ignore:need 113 images")


def npz(**arrays: Any) -> bytes:  # noqa: ANN401
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def stats(seed: int = 0, dim: int = DIM) -> GaussianStats:
    """Of as many vectors as a covariance of full rank needs."""
    rng = np.random.default_rng(seed)
    return gaussian_stats(rng.normal(size=(dim + 1, dim)) @ rng.normal(size=(dim, dim)))


def edm(s: GaussianStats) -> bytes:
    """As EDM publishes them."""
    return npz(mu=s.mean, sigma=s.cov)


# --- the file ------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ref.npz"


def test_edms_file_is_read_bit_for_bit(file: Path) -> None:
    file.write_bytes(edm(stats(dim=2048)))
    found = published_stats(file, 2048)
    np.testing.assert_array_equal(found.mean, stats(dim=2048).mean)
    np.testing.assert_array_equal(found.cov, stats(dim=2048).cov)
    assert found.mean.dtype == found.cov.dtype == np.float64


def test_float32_and_further_arrays_will_do(file: Path) -> None:
    s = stats(dim=4)
    file.write_bytes(npz(mu=s.mean.astype("f4"), sigma=s.cov.astype("f4"), mu_s=np.zeros(2)))
    assert published_stats(file, 4).cov == pytest.approx(s.cov, rel=1e-5, abs=1e-5)


def indefinite() -> bytes:
    """Variances of 1 and correlations of 2."""
    return npz(mu=np.zeros(4), sigma=np.full((4, 4), 2.0) - np.eye(4))


def test_a_covariance_of_less_than_full_rank_will_do(file: Path) -> None:
    rng = np.random.default_rng(0)
    few = rng.normal(size=(60, 256)) @ rng.normal(size=(256, 256)) + 10
    for features in (few, np.repeat(few, 2, axis=1)[:, :256]):
        for kind in (np.float64, np.float32):
            x = features.astype(kind)
            outer = x.T @ x / len(x) - np.outer(x.mean(0), x.mean(0))  # as sums of one pass are
            for cov in (np.cov(features.T).astype(kind), outer):
                file.write_bytes(npz(mu=x.mean(0), sigma=(cov + cov.T) / 2))
                found = published_stats(file, 256)
                assert frechet_distance(found, found) == pytest.approx(0, abs=0.1)
    file.write_bytes(npz(mu=np.zeros(4), sigma=np.zeros((4, 4))))
    assert not published_stats(file, 4).cov.any()


def bent(index: tuple[int, int], value: float) -> bytes:
    cov = np.eye(4)
    cov[index] = value
    return npz(mu=np.zeros(4), sigma=cov)


def executing() -> bytes:
    return npz(mu=np.array([print], dtype=object), sigma=np.eye(4))


def claiming() -> bytes:
    """A sigma whose header says that it has petabytes."""
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, "
    header = (header + b"99999999), }").ljust(127) + b"\n"
    buffer = BytesIO(npz(mu=np.zeros(4)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("sigma.npy", header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "need an .npz file with mu and sigma .*, got "),
        (b"", "need an .npz file with mu and sigma"),
        (edm(stats(dim=4))[:300], "need an .npz file with mu and sigma"),
        (npz(mean=np.zeros(4), cov=np.eye(4)), "need an .npz file with mu and sigma .*mu is not"),
        (npz(mu=np.zeros(4)), "need an .npz file with mu and sigma .*sigma is not"),
        (executing(), "need an .npz file with mu and sigma .*allow_pickle"),
        (claiming(), "need an .npz file with mu and sigma"),
        (edm(stats(dim=3)), r"need mu \(4,\) and sigma \(4, 4\).*got \(3,\) and \(3, 3\)"),
        (npz(mu=np.zeros(4), sigma=np.ones(4)), r"got \(4,\) and \(4,\)"),
        (npz(mu=np.zeros(4), sigma=np.eye(4) * 1j), "need real .*, got float64 and complex128"),
        (npz(mu=np.zeros(4, int), sigma=np.eye(4)), "need real .*, got int64 and float64"),
        (bent((0, 0), np.nan), "need finite mu and sigma .*, got NaN or infinity"),
        (npz(mu=np.full(4, np.inf), sigma=np.eye(4)), "need finite mu and sigma"),
        (bent((0, 1), 1e-3), "need a symmetric sigma .*, got differences of 0.001"),
        (indefinite(), r"need eigenvalues >= 0 of sigma .*, got one of -1 beside 7: no covariance"),
        (bent((2, 2), -0.5), "need variances >= 0 on the diagonal of sigma .*, got -0.5"),
    ],
)
def test_another_file_is_refused_with_the_key(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{message}.*in .*ref\.npz.*metric\.reference"):
        published_stats(file, 4)


def test_a_lone_array_is_refused(file: Path) -> None:
    with file.open("wb") as out:
        np.save(out, np.eye(4))
    with pytest.raises(ValueError, match="need an .npz file with mu and sigma"):
        published_stats(file, 4)


# --- from a server to the results ----------------------------------------------------------------


@dataclass
class Server:
    """Files by name, and the names that were asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def block(self, name: str, content: bytes, sha256: str | None = None) -> dict[str, str]:
        self.files[name] = content
        sha256 = sha256 or hashlib.sha256(content).hexdigest()
        return {"url": f"{self.url}/{name}", "sha256": sha256}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path[1:]
            state.asked.append(name)
            if name not in state.files:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.files[name])))
            self.end_headers()
            self.wfile.write(state.files[name])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = Server(f"http://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield state
        http.shutdown()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch)


def experiment(reference: dict[str, str] | None, **changes: Any) -> Params:  # noqa: ANN401
    row = {"model": "teacher", "sampler": "euler", "steps": 1, "guidance_scale": 1.0}
    settings = {
        "generate__images": 100,
        "metric__reference": reference,
        "metric__reference_images": 150,
        "metric__kid": {"subsets": 3, "subset_size": 10},
        "metric__bootstrap": {"resamples": 2, "confidence": 0.9},
        "rows": {ROW: row},
        "data__source": "toy.npz",
        **changes,
    }
    return tiny_params(Path(), **settings)


def scored(params: Params) -> dict[str, Any]:
    ref_stats.run(params)
    generate.run(params, ROW)
    fid.run(params, ROW)
    return read_json(fid.SCORES / f"{ROW}.json")


def tabled(params: Params) -> None:
    """The results of rows that are scored, beside students with a line of a log each."""
    for name in params.students:
        (MODELS / name).mkdir(exist_ok=True)
        Log(MODELS / name / "log.jsonl").write({"nimg": 1000, "loss": 0.5, "seconds": 1.0})
    results_table.run(params)


def features_of(images: np.ndarray) -> np.ndarray:
    return extracted(load_features("efficientnet-lite0"), images, 100)


def test_a_published_reference_is_what_the_distance_and_it_alone_is_against(
    toy: Params, server: Server
) -> None:
    block = server.block("ref.npz", edm(stats()))
    score = scored(params := experiment(block))
    with np.load(generate.SAMPLES / f"{ROW}.npz") as samples:
        ours = gaussian_stats(features_of(samples["images"]))
    assert score["value"] == pytest.approx(frechet_distance(ours, stats()), rel=1e-9)
    own = experiment(None, generate__images=50)  # as many of our own as there may be
    assert score["value"] != pytest.approx(scored(own)["value"], rel=0.01)
    assert server.asked == ["ref.npz"], "once for all stages"
    assert params.metric.reference == Download(**block)


def test_other_metrics_are_against_our_own_data_and_the_results_say_so(
    toy: Params, server: Server
) -> None:
    plain = scored(experiment(None, generate__images=50))
    published = experiment(server.block("ref.npz", edm(stats())), generate__images=50)
    score = scored(published)
    assert score["metrics"]["KD-EffLite0"] == plain["metrics"]["KD-EffLite0"]
    assert score["classes"] == plain["classes"] and score["value"] != plain["value"]
    tabled(published)
    text = " ".join(Path("results/table.md").read_text().split())
    assert "published statistics ref.npz (sha256" in text
    assert "against 150 images of our own data" in text


def test_the_hashes_of_reference_and_detector_are_in_every_result(
    toy: Params, server: Server
) -> None:
    block = server.block("ref.npz", edm(stats()))
    score = scored(params := experiment(block))
    about = read_json(STATS_ABOUT)
    for result in (score, about):
        assert result["reference_file"] == block
        assert result["detector_sha256"] == load_features("efficientnet-lite0").sha256
    assert score["reference_sha256"] == sha256_file(ref_stats.STATS)
    np.testing.assert_array_equal(load_reference(ref_stats.STATS).stats.cov, stats().cov)
    tabled(params)
    (column,) = json.loads(Path("results/metrics.json").read_text())
    against = hashlib.sha256(f"{block['sha256']} ".encode()).hexdigest()
    assert column == f"FD-EffLite0-{against[:4]}"
    with Path("results/table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reference_file.sha256"] == block["sha256"]
    assert row["detector_sha256"] == score["detector_sha256"]
    assert block["sha256"] in Path("results/report.html").read_text()


def test_scores_against_another_reference_are_in_no_table_of_these(
    toy: Params, server: Server
) -> None:
    first = experiment(server.block("ref.npz", edm(stats())))
    one = scored(first)
    other = experiment(server.block("other.npz", edm(stats(seed=1))))
    with pytest.raises(ValueError, match=r"need the reference .*other\.npz.*got .*ref\.npz"):
        fid.run(other, ROW)  # before ref-stats is made again
    with pytest.raises(ValueError, match=r"need the reference of our own data, got .*ref\.npz"):
        fid.run(experiment(None), ROW)
    two = scored(other)
    assert one["reference_sha256"] != two["reference_sha256"]
    rows = {"one": replace(first.rows[ROW]), "two": replace(first.rows[ROW])}
    params = replace(other, rows=rows)
    for name, score in (("one", one), ("two", two)):
        (fid.SCORES / f"{name}.json").write_text(json.dumps({**score, "row": name}))
    with pytest.raises(ValueError, match="need one reference_sha256 in a table, got"):
        results_table.run(params)


def test_the_floor_takes_the_images_that_are_left(toy: Params, server: Server) -> None:
    ref_stats.run(experiment(server.block("ref.npz", edm(stats()))))
    floor = read_json(STATS_ABOUT)["floor"]
    assert (floor["images"], floor["other_images"]) == (50, None)  # of 200, 150 are the reference
    dataset = ImageDataset(DATA)
    rest = features_of(dataset.read(real_images(dataset, 200)[150:])[0])
    assert floor["value"] == pytest.approx(frechet_distance(gaussian_stats(rest), stats()))
    none_left = experiment(server.block("ref.npz", edm(stats())), metric__reference_images=199)
    with pytest.raises(ValueError, match=r"need 199 \+ 2 disjoint images, got 200"):
        ref_stats.run(none_left)


def test_a_wrong_reference_is_refused_before_the_work(
    toy: Params, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ref_stats, "shared_outputs", None)
    params = experiment(server.block("ref.npz", edm(stats(dim=2048))))
    with pytest.raises(ValueError, match=r"need mu \(112,\) .* got \(2048,\)"):
        ref_stats.run(params)
    with pytest.raises(ValueError, match="need sha256 0000"):
        ref_stats.run(experiment(server.block("ref.npz", edm(stats()), "0" * 64)))


def test_a_validation_is_against_the_published_reference_too(toy: Params, server: Server) -> None:
    params = experiment(server.block("ref.npz", edm(stats())))
    settings = Validation(0.1, 20, 5, 9999, "ddim", 2, 1.0)  # more images than there are
    v = Validator(params, settings, EDM, ImageDataset(DATA), Rank(0, 1, torch.device("cpu")))
    np.testing.assert_array_equal(v.reference.mean, stats().mean)


def test_several_ranges_need_no_resamples(toy: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    params = experiment(None, generate__images=50, generate__seed_ranges=2)
    ref_stats.run(params)  # the floor has one range, and resamples
    monkeypatch.setattr("fewstep.metrics.score.bootstrap_error", None)
    generate.run(params, ROW)
    fid.run(params, ROW)
    assert read_json(fid.SCORES / f"{ROW}.json")["metrics"]["FD-EffLite0"]["std_of"] == "ranges"


# --- unknown checksums, from the first command to the last ---------------------------------------


def test_unknown_checksums_are_all_told_at_once_and_pasting_them_is_enough(
    toy: Params, server: Server
) -> None:
    content = {"ref.npz": edm(stats()), "teacher.pkl": b"a network"}
    blocks = {name: server.block(name, data, "unknown") for name, data in content.items()}
    teacher, reference = blocks["teacher.pkl"], blocks["ref.npz"]
    params = experiment(reference, teacher=teacher)
    with pytest.raises(ValueError) as error:
        download_all.run(params)
    lines = str(error.value).splitlines()
    told = {key: hashlib.sha256(content[name]).hexdigest() for key, name in
            (("teacher", "teacher.pkl"), ("metric.reference", "ref.npz"))}  # fmt: skip
    assert len(lines) == 2
    for line, (key, sha256) in zip(lines, told.items(), strict=True):
        assert f"is {sha256}: " in line and f"params.yaml: {key}.sha256" in line
    with pytest.raises(ValueError, match=r"got unknown.*metric\.reference\.sha256"):
        ref_stats.run(params)
    params = experiment(
        {**reference, "sha256": told["metric.reference"]},
        teacher={**teacher, "sha256": told["teacher"]},
    )
    download_all.run(params)
    ref_stats.run(params)
    assert sorted(server.asked) == ["ref.npz", "teacher.pkl"], "each once"


def test_what_fails_keeps_no_other_from_being_fetched(toy: Params, server: Server) -> None:
    imports = {"theirs": server.block("theirs.pkl", b"another network")}
    teacher = {"url": f"{server.url}/gone.pkl", "sha256": "0" * 64}
    params = experiment(None, teacher=teacher, imports=imports, data__source="absent.npz")
    assert [key for key, _ in downloads(params)] == ["teacher", "imports.theirs"]
    with pytest.raises(
        ValueError, match=r"(?s)absent\.npz, which you have to provide.*gone\.pkl, got HTTP 404"
    ):
        download_all.run(params)
    assert server.asked == ["gone.pkl", "theirs.pkl"]
