"""Features and the Fréchet distance: closed forms, recorded numbers, invariance, refusals."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.multiprocessing.spawn import spawn

from extraction import features_of
from fewstep.distributed import Rank
from fewstep.metrics import efficientnet, frechet
from fewstep.metrics import features as extraction_code
from fewstep.metrics.features import (
    CHUNK,
    GPU_CHUNK,
    FeatureExtractor,
    extract_outputs,
    gather_features,
    load_features,
    rank_images,
)
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats

PARITY = Path(__file__).parents[1] / "data" / "parity" / "frechet.npz"


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return load_features("efficientnet-lite0")


def pattern(count: int, channels: int = 1, size: int = 16) -> NDArray[np.uint8]:
    """Images by formula, so that the pinned numbers depend on no generator."""
    i, c, y, x = np.ogrid[:count, :channels, :size, :size]
    return ((i * 41 + c * 83 + 3 * y * y + 7 * x * (i + 1)) % 256).astype(np.uint8)


def gaussian(mean: list[float], cov: NDArray[np.float64], count: int = 1000) -> GaussianStats:
    return GaussianStats(np.array(mean, dtype=np.float64), cov, count)


# --- EfficientNet-Lite0 ----------------------------------------------------------------------


def test_features_of_fixed_images_are_the_pinned_numbers(lite0: FeatureExtractor) -> None:
    features = features_of(lite0, pattern(4), batch=4)
    assert features.shape == (4, lite0.dim) and features.dtype == np.float32
    pinned = [
        [0.8045, -6.3883, -1.1021, 2.7088],
        [-4.3675, -5.266, -2.3171, 1.4478],
        [-12.6575, -5.8707, -0.1067, 4.0219],
    ]
    np.testing.assert_allclose(features[[0, 1, 3], :4], pinned, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_distance_is_the_same_to_the_bit_for_every_batch_size_and_number_of_ranks(
    lite0: FeatureExtractor, threads: int
) -> None:
    images = pattern(2 * CHUNK + 37)
    whole = features_of(lite0, images, batch=len(images))
    reference = gaussian_stats(whole + 0.1)
    distance = frechet_distance(gaussian_stats(whole), reference)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cuts = [features_of(lite0, images, batch) for batch in (1, 7, 64, CHUNK, 150)]
        for world in (2, 3, 5):  # 5: more ranks than chunks
            own = [rank_images(len(images), rank, world) for rank in range(world)]
            shards = [images[r.start : r.stop] for r in own]
            cuts.append(np.concatenate([features_of(lite0, s, 64) for s in shards if len(s)]))
    finally:
        torch.set_num_threads(before)
    for features in cuts:
        assert (features == whole).all()
        assert frechet_distance(gaussian_stats(features), reference) == distance


def test_grey_equals_the_same_grey_in_three_channels(lite0: FeatureExtractor) -> None:
    grey = pattern(3)
    features = features_of(lite0, grey.repeat(3, axis=1), batch=3)
    np.testing.assert_allclose(features, features_of(lite0, grey, batch=3), atol=1e-5)


def test_folded_batch_norms_give_the_features_of_the_published_layers(
    lite0: FeatureExtractor,
) -> None:
    network = efficientnet.EfficientNetLite0().eval()
    state = torch.load(efficientnet.weights_path(), weights_only=True)
    network.load_state_dict(state, strict=True)
    images = torch.from_numpy(pattern(3, channels=3, size=64))
    with torch.inference_mode():
        torch.testing.assert_close(lite0(images), network(images), rtol=1e-5, atol=1e-5)


def test_feature_block_is_the_last_of_112_channels() -> None:
    widths = [stage.channels for stage in efficientnet.STAGES for _ in range(stage.blocks)]
    assert len(widths) == 16
    assert widths[efficientnet.FEATURE_BLOCK] == efficientnet.DIM == 112
    assert widths[efficientnet.FEATURE_BLOCK + 1] == 192


def test_same_padding_of_even_images_is_at_the_bottom_right_only() -> None:
    conv = efficientnet.SameConv2d(1, 1, kernel=3, stride=2)
    torch.nn.init.ones_(conv.weight)
    counted = conv(torch.ones(1, 1, 4, 4))[0, 0].tolist()
    assert counted == [[9.0, 6.0], [6.0, 4.0]]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=r"need sha256 579344248a93\w+ of .*weights.pth, got \w+"):
        efficientnet.load_efficientnet(file)
    with pytest.raises(ValueError, match="got no file"):
        efficientnet.load_efficientnet(tmp_path / "absent.pth")


# --- the interface ---------------------------------------------------------------------------


def test_unknown_features_are_refused_with_the_known_names() -> None:
    message = (
        r"need features from efficientnet-lite0, .*, got 'vgg' \(params.yaml: metric.features\)"
    )
    with pytest.raises(ValueError, match=message):
        load_features("vgg")


def test_results_say_which_features_they_are_of(lite0: FeatureExtractor) -> None:
    assert lite0.label == "FD-EffLite0"
    assert lite0.sha256.startswith("579344248a93")


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)]
)
def test_images_that_are_not_uint8_nchw_are_refused(
    lite0: FeatureExtractor, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"need uint8 images of shape \(N, 1 or 3, H, W\)"):
        lite0(images)


def channel_means(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((2, 3))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_compute_on_one_core_each_in_order_and_leave_torch_as_it_was(workers: int) -> None:
    before, seen = torch.get_num_threads(), set()

    def spy(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.add(torch.get_num_threads())
        time.sleep(0.02 * (chunk[0, 0, 0, 0].item() % 3))  # later chunks overtake
        return {"mean": channel_means(chunk)}

    images = pattern(5 * CHUNK + 3)
    torch.set_num_threads(2)
    try:
        found = extract_outputs(spy, [images], workers=workers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (found["mean"] == channel_means(torch.from_numpy(images)).numpy()).all()
    assert seen == {1 if workers else 2}


def test_error_of_a_worker_is_raised_and_stops_the_others() -> None:
    calls = []

    def fail(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(chunk))
        raise ValueError("bad chunk")

    with pytest.raises(ValueError, match="bad chunk"):
        extract_outputs(fail, [pattern(20 * CHUNK)], workers=2)
    assert len(calls) <= 4


def test_progress_counts_every_image_once() -> None:
    done: list[int] = []
    features_of(channel_means, pattern(2 * CHUNK + 10), 30, done.append)
    assert done == [CHUNK, CHUNK, 10]


def fussy(images: torch.Tensor) -> torch.Tensor:
    """Features that change with an image's place in the call and with the call's size."""
    count = len(images)
    return channel_means(images) + torch.arange(count)[:, None] / 7 + torch.tensor(count).log()


def test_features_of_a_network_that_minds_its_batch_are_the_same_however_images_come() -> None:
    images = pattern(3 * CHUNK + 37)
    whole = features_of(fussy, images, batch=len(images))
    for batch in (1, 7, CHUNK, 150):
        assert (features_of(fussy, images, batch) == whole).all()
    for world in (2, 3, 4):
        own = [rank_images(len(images), rank, world) for rank in range(world)]
        shards = [features_of(fussy, images[r.start : r.stop], 64) for r in own]
        assert (np.concatenate(shards) == whole).all()


@pytest.mark.parametrize("count", [0, 1, CHUNK, 5 * CHUNK + 1, 1234])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_ranks_share_whole_chunks_evenly_and_leave_out_nothing(count: int, world: int) -> None:
    own = [rank_images(count, rank, world) for rank in range(world)]
    assert [i for r in own for i in r] == list(range(count))
    assert all(r.start % CHUNK == 0 for r in own if r)
    chunks = [-(-len(r) // CHUNK) for r in own]
    assert max(chunks) - min(chunks) <= 1 and chunks[0] == max(chunks)


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="need 0 <= rank < world, got rank 2 of 2"):
        rank_images(10, 2, 2)


def test_a_gpu_gets_more_images_a_call_and_the_next_ones_before_the_last_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def copied(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        order.append(f"launched {len(rows)}")

        def wait() -> torch.Tensor:
            order.append("read")
            return rows

        return wait

    monkeypatch.setattr(extraction_code, "to_host", copied)
    network = FeatureExtractor("x", "x", 1, "", lambda x: {}, torch.device("cuda"))
    assert network.chunk == GPU_CHUNK > CHUNK
    assert replace(network, device=torch.device("cpu")).chunk == CHUNK
    images = pattern(2 * GPU_CHUNK + 3)
    found = extract_outputs(
        lambda x: {"mean": channel_means(x)}, [images], chunk=network.chunk, workers=0
    )
    assert (found["mean"] == channel_means(torch.from_numpy(images)).numpy()).all()
    each = f"launched {GPU_CHUNK}"
    assert order == [each, each, "read", each, "read", "read"]
    own = [rank_images(len(images), rank, 2, GPU_CHUNK) for rank in range(2)]
    assert [len(part) for part in own] == [2 * GPU_CHUNK, 3]


def test_outputs_of_a_stream_keep_their_names_and_order() -> None:
    images = pattern(CHUNK + 20)
    batches = [images[:3], images[3:3], images[3:110], images[110:]]
    found = extract_outputs(lambda x: {"mean": channel_means(x), "flat": x.flatten(1)}, batches)
    assert (found["flat"] == images.reshape(len(images), -1)).all()
    assert found["mean"].shape == (len(images), 1)
    assert extract_outputs(lambda x: {"mean": channel_means(x)}, []) == {}


def test_ranks_gather_in_order_of_the_images(tmp_path: Path) -> None:
    count = CHUNK + 5  # two chunks on three ranks: one has none
    spawn(_gather_on, (3, count, tmp_path), nprocs=3)
    with np.load(tmp_path / "0.npz") as gathered:
        assert (gathered["mean"] == channel_means(torch.from_numpy(pattern(count))).numpy()).all()
    assert not (tmp_path / "1.npz").exists()


def _gather_on(rank: int, world: int, count: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    own = rank_images(count, rank, world)
    found = extract_outputs(
        lambda x: {"mean": channel_means(x)}, [pattern(count)[own.start : own.stop]]
    )
    gathered = gather_features(found, Rank(rank, world, torch.device("cpu")))
    if gathered is not None:
        np.savez(folder / f"{rank}.npz", mean=gathered["mean"])
    dist.destroy_process_group()


# --- Fréchet distance ------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [0])
def test_distance_equals_the_recorded_reference(pair: int) -> None:
    with np.load(PARITY) as vectors:
        a, b = (gaussian_stats(vectors[f"{pair}/features_{side}"]) for side in "ab")
        assert frechet_distance(a, b) == pytest.approx(float(vectors[f"{pair}/fid"]), rel=1e-9)


@pytest.mark.parametrize("dim", [112, 512])
def test_distance_is_the_same_to_the_bit_on_any_number_of_threads(dim: int) -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(dim, dim)) / dim**0.5
    x, y = (rng.normal(size=(3 * dim, dim)) @ spread + shift for shift in (0, 0.1))
    before, distances = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            distances.add(frechet_distance(gaussian_stats(x), gaussian_stats(y)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(distances) == 1


@pytest.mark.slow
def test_distance_of_2048_features_is_scipys_and_at_least_two_and_a_half_times_as_fast() -> None:
    dim, rng = 2048, np.random.default_rng(0)
    spread = rng.normal(size=(dim, dim)) / dim**0.5 * np.linspace(0.2, 2, dim)
    a, b = (gaussian_stats(rng.normal(size=(2 * dim, dim)) @ spread + s) for s in (0, 0.05))
    start = time.perf_counter()
    ours = frechet_distance(a, b)
    middle = time.perf_counter()
    root = np.trace(scipy.linalg.sqrtm(a.cov @ b.cov)).real
    end = time.perf_counter()
    offset = np.square(a.mean - b.mean).sum()
    theirs = offset + np.trace(a.cov) + np.trace(b.cov) - 2 * root
    assert ours == pytest.approx(theirs, rel=1e-6)
    seconds = middle - start, end - middle
    print(f"d = {dim}: eigh {seconds[0]:.1f} s, scipy.linalg.sqrtm {seconds[1]:.1f} s")
    assert seconds[1] / seconds[0] >= 2.5


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    a = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([1, 2, 2], np.diag([4.0, 4.0, 1.0]))
    # |mean|^2 + sum (std_a - std_b)^2
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4, rel=1e-12)


def test_distance_is_symmetric_zero_to_itself_and_invariant_to_rotation() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(300, 12)), generator.normal(1, 2, size=(200, 12))
    y[:, 1] += y[:, 0]
    rotation = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    a, b = gaussian_stats(x), gaussian_stats(y)
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    turned = frechet_distance(gaussian_stats(x @ rotation), gaussian_stats(y @ rotation))
    assert turned == pytest.approx(distance, rel=1e-10)


def test_distance_of_singular_covariances_is_finite_and_exact() -> None:
    a, b = gaussian([0, 0], np.diag([1.0, 0.0])), gaussian([0, 0], np.diag([0.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(2, abs=1e-7)


def test_covariance_divides_by_one_less_than_the_images_in_float64() -> None:
    # 1e4 apart from 0, float32 sums would lose the variance.
    stats = gaussian_stats(np.array([[1e4], [1e4 + 1], [1e4 + 2], [1e4 + 3]], dtype=np.float32))
    assert stats.cov.dtype == np.float64 and stats.count == 4
    assert stats.cov.item() == pytest.approx(5 / 3, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features = np.zeros((5, 2))
    features[3, 1] = bad
    with pytest.raises(ValueError, match="finite features, got NaN or infinity in 1 of 5 images"):
        gaussian_stats(features)
    with pytest.raises(ValueError, match="finite stats, got NaN or infinity in the second"):
        frechet_distance(gaussian([0], np.eye(1)), gaussian([bad], np.eye(1)))


def test_statistics_do_not_hang_on_how_many_rows_are_summed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = np.random.default_rng(0).normal(3, 1, size=(100, 5)).astype(np.float32)
    whole = gaussian_stats(features)
    np.testing.assert_allclose(whole.cov, np.cov(features.astype(np.float64).T), rtol=1e-12)
    monkeypatch.setattr(frechet, "ROWS", 7)
    np.testing.assert_allclose(gaussian_stats(features).cov, whole.cov, rtol=1e-12)


def test_one_image_is_refused_and_too_few_for_full_rank_warn() -> None:
    with pytest.raises(ValueError, match="need at least 2 images for a covariance, got 1"):
        gaussian_stats(np.zeros((1, 3)))
    with pytest.warns(UserWarning, match="need 4 images for a covariance of full rank, got 3"):
        gaussian_stats(np.zeros((3, 3)))


def test_stats_of_different_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="need stats of one feature dimension, got 1 and 2"):
        frechet_distance(gaussian([0], np.eye(1)), gaussian([0, 0], np.eye(2)))
