"""Feature networks by name: uint8 images in, one vector per image out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fewstep.distributed import Rank, to_device, to_host
from fewstep.metrics import clip, dinov2, efficientnet, inception
from fewstep.metrics.vit import Embedding
from fewstep.progress import progress

T = TypeVar("T")
R = TypeVar("R")

Outputs = Mapping[str, NDArray[np.float32]]
"""The outputs of a feature network for N images, each (N, d); `features` among them."""

CHUNK = 50  # images per network call on a CPU; divides the usual 10,000 and 50,000
GPU_CHUNK = 250  # on a GPU, which 50 images of a small network would leave idle; divides them, too


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network and what a result must record about it.

    Args:
        name: as in params.yaml: metric.features.
        label: the name of a distance on these features in tables ("FD-EffLite0").
        dim: length d of a feature vector.
        sha256: of the weights file.
        network: uint8 (B, C, H, W) -> "features" (B, d), and for other metrics "logits" and
            "spatial".
        device: of `network`.
    """

    name: str
    label: str
    dim: int
    sha256: str
    network: "Network"
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Only the features, float32, shape (N, d); otherwise as `outputs`."""
        return self.outputs(images)["features"]

    @property
    def workers(self) -> int:
        """Chunks to compute at once: on a CPU one per core, see `extract_outputs`."""
        return torch.get_num_threads() if self.device.type == "cpu" else 0

    @property
    def chunk(self) -> int:
        """Images of a network call, see `extract_outputs`."""
        return CHUNK if self.device.type == "cpu" else GPU_CHUNK

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs for `images`, uint8, shape (N, C, H, W), C = 1 or 3: float32, (N, any).

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "need uint8 images of shape (N, 1 or 3, H, W), "
                f"got {images.dtype} of shape {tuple(images.shape)} (params.yaml: data.channels)"
            )
        with torch.inference_mode(), exact_products(self.device):
            outputs = self.network(to_device(images, self.device))
            return {name: rows.float() for name, rows in outputs.items()}


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """All products in float32: with TF32, a score would depend on the kind of GPU."""
    if device.type == "cpu":  # several threads may run this, and the flags are global
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        products.allow_tf32 = before


Network = Callable[[Tensor], Mapping[str, Tensor]]
Loaded = tuple[Network, str, int, str]
"""Network, label, dim and sha256, as in `FeatureExtractor`."""

Loader = Callable[[torch.device, Path | None, str | None], Loaded]
"""From the device, the weights and their sha256."""


def _efficientnet_lite0(device: torch.device, weights: Path | None, sha256: str | None) -> Loaded:
    network = efficientnet.load_efficientnet(weights).to(device)
    # never "FID": that name belongs to Inception-2015
    return (
        lambda images: {"features": network(images)},
        "FD-EffLite0",
        efficientnet.DIM,
        efficientnet.SHA256,
    )


def _inception_2015(device: torch.device, weights: Path | None, sha256: str | None) -> Loaded:
    if weights is None:
        raise ValueError(
            f"need the weights of inception-2015, {inception.URL} with sha256 "
            f"{inception.SHA256}, got none (params.yaml: metric.weights)"
        )
    sha256 = (sha256 or inception.SHA256).lower()
    label = "FID" if sha256 == inception.SHA256 else "FD-Inception"
    network = inception.load_inception(weights, sha256).to(device)
    return network, label, inception.DIM, sha256


def _embedding(name: str, label: str, url: str, load: Callable[[Path, str], Embedding]) -> Loader:
    def loader(device: torch.device, weights: Path | None, sha256: str | None) -> Loaded:
        if weights is None or sha256 is None:
            raise ValueError(
                f"need the weights of {name}, {url}, and their sha256, got "
                f"{weights} and {sha256} (params.yaml: metric.weights)"
            )
        network = load(weights, sha256.lower()).to(device)
        return network, label, network.vit.dim, sha256.lower()

    return loader


FEATURES: dict[str, Loader] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "inception-2015": _inception_2015,
    "dinov2": _embedding("dinov2", "FD-DINOv2", dinov2.URL, dinov2.load_dinov2),
    "clip": _embedding("clip", "FD-CLIP", clip.URL, clip.load_clip),
}


def load_features(
    name: str,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    sha256: str | None = None,
) -> FeatureExtractor:
    """The feature network called `name`, on `device`.

    Args:
        name: one of FEATURES.
        weights: its file, from `fewstep.download.fetch`; None if an installed package contains it.
        sha256: of that file; None takes the published one, if it is known.

    Raises:
        ValueError: an unknown name, or weights that are missing or do not match the sha256.
    """
    if name not in FEATURES:
        known = ", ".join(FEATURES)
        raise ValueError(f"need features from {known}, got {name!r} (params.yaml: metric.features)")
    device = torch.device(device)
    network, label, dim, sha256 = FEATURES[name](device, weights, sha256)
    return FeatureExtractor(name, label, dim, sha256, network, device)


def rank_images(count: int, rank: int, world: int, chunk: int = CHUNK) -> range:
    """The images of one rank out of `count`: whole chunks, in order, as even as possible.

    Concatenated over ranks, their features are bit-identical to those that one rank extracts.

    Raises:
        ValueError: not 0 <= rank < world.
    """
    if not 0 <= rank < world:
        raise ValueError(f"need 0 <= rank < world, got rank {rank} of {world}")
    chunks = -(-count // chunk)
    first, last = (chunk * -(-chunks * r // world) for r in (rank, rank + 1))
    return range(min(first, count), min(last, count))


def check_features(a: NDArray[np.floating], b: NDArray[np.floating], least: int = 2) -> None:
    """Refuse two feature sets that no distance is defined for.

    Raises:
        ValueError: not matrices of one width, fewer than `least` rows, NaN or infinity.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"need features of shapes (m, d) and (n, d), got {a.shape} and {b.shape} "
            "(params.yaml: metric.features)"
        )
    if min(len(a), len(b)) < least:
        raise ValueError(
            f"need at least {least} images on either side, got {len(a)} and {len(b)} "
            "(params.yaml: generate.images, metric.reference_images)"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("need finite features, got NaN or infinity")


def extract_outputs(
    outputs: Callable[[Tensor], Mapping[str, Tensor]],
    batches: Iterable[NDArray[np.uint8]],
    progress: Callable[[int], object] | None = None,
    workers: int = 0,
    chunk: int = CHUNK,
) -> dict[str, NDArray[np.float32]]:
    """All outputs of a network for a stream of images, from files or straight from a sampler.

    Another number of images in a call, or of cores, can change the order of sums and so the last
    bits. So the network always sees `chunk` images, the last chunk filled up with black ones:
    neither the size of the batches nor the number of ranks (`rank_images`) changes the results.

    A GPU gets the next chunk before the outputs of the last one are read, so that it never waits.

    Args:
        outputs: uint8 (B, C, H, W) -> named (B, d), such as `FeatureExtractor.outputs`.
        batches: uint8, each of shape (any, C, H, W).
        progress: called with the number of images of each finished chunk.
        workers: chunks at once, each on one core; 0: one chunk at a time on all of torch's
            threads, for a GPU. See `FeatureExtractor.workers`.
        chunk: images of a call, of `FeatureExtractor.chunk`.

    Returns:
        By name, shape (N, d); empty if there are no images, as on a spare rank.
    """
    parts: dict[str, list[NDArray[np.float32]]] = {}

    def work(images: NDArray[np.uint8]) -> dict[str, Callable[[], Tensor]]:
        black = np.zeros((chunk - len(images), *images.shape[1:]), np.uint8)
        found = outputs(torch.from_numpy(np.concatenate([images, black])))
        return {name: to_host(rows) for name, rows in found.items()}

    for images, found in _in_order(work, _chunks(batches, chunk), workers):
        for name, rows in found.items():
            parts.setdefault(name, []).append(rows()[: len(images)].numpy())
        if progress is not None:
            progress(len(images))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _chunks(
    batches: Iterable[NDArray[np.uint8]], chunk: int = CHUNK
) -> Iterator[NDArray[np.uint8]]:
    """The same images, `chunk` at a time; the last ones may be fewer."""
    waiting: list[NDArray[np.uint8]] = []
    for batch in batches:
        while len(batch):
            room = chunk - sum(map(len, waiting))
            waiting.append(batch[:room])
            batch = batch[room:]
            if sum(map(len, waiting)) == chunk:
                yield np.concatenate(waiting)
                waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Each item and its result; `workers` threads run ahead, each computing on one core.

    Without workers one more item is begun before a result is used: a GPU then computes meanwhile.
    """
    if workers == 0:
        begun: deque[tuple[T, R]] = deque()
        for item in items:
            begun.append((item, work(item)))
            if len(begun) > 1:
                yield begun.popleft()
        yield from begun
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) == workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the workers' setting is their own in torch, global in MKL


def gather_features(
    features: Mapping[str, NDArray[np.float32]], rank: Rank
) -> dict[str, NDArray[np.float32]] | None:
    """The features of all ranks, in the order of the images, on the first rank; else None.

    Args:
        features: of this rank's `rank_images`.
    """
    if rank.world == 1:
        return dict(features)
    # not `distributed.gather`: it would send gigabytes to ranks that have no use for them
    everyone: list[Any] | None = [None] * rank.world if rank.first else None
    dist.gather_object(features, everyone)
    if everyone is None:
        return None
    return {name: np.concatenate([f[name] for f in everyone if f]) for name in everyone[0]}


def shared_outputs(
    extractor: FeatureExtractor,
    read: Callable[[range], NDArray[np.uint8]],
    count: int,
    rank: Rank,
    desc: str,
) -> dict[str, NDArray[np.float32]] | None:
    """All outputs of `count` images on the first rank, the same for any number; else None.

    Args:
        read: returns the images (B, C, H, W) of a range of indices below `count`.
    """
    chunk, workers = extractor.chunk, extractor.workers
    mine = rank_images(count, rank.index, rank.world, chunk)
    parts = (mine[start : start + chunk] for start in range(0, len(mine), chunk))
    with progress(len(mine), desc, silent=not rank.first) as bar:
        outputs = extract_outputs(extractor.outputs, map(read, parts), bar.update, workers, chunk)
    return gather_features(outputs, rank)
