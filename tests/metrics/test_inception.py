"""Inception-2015 against torch-fidelity's with random weights; its files; its resize."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extraction import features_of
from fewstep.files import sha256_file
from fewstep.metrics.features import CHUNK, load_features, rank_images
from fewstep.metrics.inception import (
    SHA256,
    URL,
    Inception,
    load_inception,
    resize_like_tensorflow1,
)
from fidelity import fidelity_module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the published names, through which images still differ at the end."""
    torch.manual_seed(0)
    network = Inception().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return load_inception(weights, sha256_file(weights))


@pytest.fixture(scope="module")
def reference(weights: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """torch-fidelity's network on the same weights."""
    module = fidelity_module("feature_extractor_inceptionv3")
    names = ["2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3("inception", names, str(weights))
    branch: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, output: branch.append(output))

    def answer(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            features, logits = theirs(images)
        spatial = branch.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "logits": logits, "spatial": spatial}

    return answer


def random_images(count: int, size: int, channels: int = 3) -> NDArray[np.uint8]:
    """Blotches, since noise has the same features everywhere."""
    rng = np.random.default_rng(size)
    coarse = rng.integers(0, 256, (count, channels, 4, 4), np.uint8)
    return coarse.repeat(-(-size // 4), 2).repeat(-(-size // 4), 3)[..., :size, :size]


@pytest.mark.parametrize("size", [16, 64, 299, 320])
def test_all_outputs_equal_those_of_torch_fidelity(
    network: Inception, reference: Callable[[Tensor], dict[str, Tensor]], size: int
) -> None:
    images = torch.from_numpy(random_images(2, size))
    with torch.inference_mode():
        ours = network(images)
    theirs = reference(images)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm(dim=1) / expected.norm(dim=1)
        assert ours[name].shape == expected.shape
        assert float(error.max()) <= 1e-5, name
        assert float((expected[0] - expected[1]).norm() / expected.norm()) > 0.01  # no constants


def test_grey_equals_the_same_grey_in_three_channels(network: Inception) -> None:
    grey = torch.from_numpy(random_images(2, 16, channels=1))
    with torch.inference_mode():
        one, three = network(grey), network(grey.expand(-1, 3, -1, -1))
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-5, atol=1e-6)


def test_resize_samples_at_multiples_of_the_scale_without_half_pixels() -> None:
    row = torch.tensor([[[[0.0, 10.0, 30.0]]]])
    # 6 positions at 0, 0.5, 1, ... of 3 pixels; behind the last pixel stands the last pixel
    assert resize_like_tensorflow1(row, 6)[0, 0, 0].tolist() == [0, 5, 10, 20, 30, 30]
    column = row.transpose(2, 3)
    assert resize_like_tensorflow1(column, 6)[0, 0, :, 3].tolist() == [0, 5, 10, 20, 30, 30]


def test_resize_down_picks_pixels_without_averaging() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert resize_like_tensorflow1(image, 4)[0, 0].tolist() == image[0, 0, ::2, ::2].tolist()


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = torch.from_numpy(random_images(1, 299)).float()
    assert torch.equal(resize_like_tensorflow1(image, 299), image)


@pytest.mark.slow
def test_features_are_the_same_to_the_bit_for_every_batch_size_and_number_of_ranks_and_cores(
    weights: Path,
) -> None:
    extractor = load_features("inception-2015", "cpu", weights, sha256_file(weights))
    images = random_images(CHUNK + 5, 16)
    own = [rank_images(len(images), rank, 2) for rank in range(2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = features_of(extractor, images, batch=len(images))
        torch.set_num_threads(2)
        shards = [features_of(extractor, images[r.start : r.stop], batch=7) for r in own]
    finally:
        torch.set_num_threads(before)
    assert (np.concatenate(shards) == whole).all()


def test_only_the_published_weights_are_called_fid(weights: Path) -> None:
    extractor = load_features("inception-2015", "cpu", weights, sha256_file(weights))
    assert extractor.label == "FD-Inception" and extractor.sha256 == sha256_file(weights)
    outputs = extractor.outputs(torch.from_numpy(random_images(1, 16, channels=1)))
    assert {name: rows.shape[1] for name, rows in outputs.items()} == {
        "features": 2048,
        "logits": 1008,
        "spatial": 2023,
    }


def test_features_without_weights_are_refused_and_the_file_is_named() -> None:
    with pytest.raises(ValueError, match=f"need the weights .*{URL} with sha256 {SHA256}, got no"):
        load_features("inception-2015")


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"need sha256 {SHA256} of .*inception.pth, got .* metric"):
        load_features("inception-2015", "cpu", weights)
    with pytest.raises(ValueError, match="got no file"):
        load_features("inception-2015", "cpu", tmp_path / "absent.pth")


class _Touch:
    """Unpickled the ordinary way, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_unexecuted_and_the_right_file_is_named(tmp_path: Path) -> None:
    path, made = tmp_path / "inception-v3-2015-12-05.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps(_Touch(made), protocol=2))
    with pytest.raises(
        ValueError, match=f"need {URL}, got .*2015-12-05.pkl, which .* was not loaded"
    ):
        load_inception(path, sha256_file(path))
    torch.save(_Touch(made), path)
    with pytest.raises(ValueError, match="was not loaded"):
        load_inception(path, sha256_file(path))
    assert not made.exists()


def test_truncated_and_foreign_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="was not loaded"):
        load_inception(path, sha256_file(path))
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="got other names or shapes in .*weights.pth"):
        load_inception(path, sha256_file(path))
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ValueError, match="need a state dict"):
        load_inception(path, sha256_file(path))
