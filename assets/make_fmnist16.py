"""Make fmnist16.npz, the default's images: Fashion-MNIST at 16x16.

    sudo apt-get install dataset-fashion-mnist
    python assets/make_fmnist16.py [FOLDER]

FOLDER holds Zalando's idx files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz), from
the Debian package above or from https://github.com/zalandoresearch/fashion-mnist. The first
50,000 training images are padded from 28x28 to 32x32 with zeros, averaged over 2x2 boxes and
rounded half up. Result: images uint8 (50000, 1, 16, 16), labels int64 (50000,) in [0, 10). The
pixels are the same everywhere; the file's bytes also depend on the zlib that packs them.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from fewstep.files import atomic_path, sha256_file

COUNT = 50_000  # leaves 10,000 of the 60,000 untouched; the file stays under 8 MB
HERE = Path(__file__).parent


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file: 2 zeros, type 8, ndim, big-endian sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"need an idx file of uint8 in {path}, got a header of {raw[:4]!r}")
    ndim = raw[3]
    shape = np.frombuffer(raw, ">u4", count=ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape.tolist())


def halve(images: np.ndarray) -> np.ndarray:
    """28x28 to 16x16: pad to 32x32 with zeros, average 2x2 boxes, round half up.

    Args:
        images: uint8 (N, 28, 28).

    Returns:
        uint8 (N, 1, 16, 16).
    """
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint16)
    boxes = padded.reshape(-1, 1, 16, 2, 16, 2).sum(axis=(3, 5), dtype=np.uint16)
    return ((boxes + 2) // 4).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    parser.add_argument("--output", type=Path, default=HERE / "fmnist16.npz")
    args = parser.parse_args()
    images = halve(read_idx(args.folder / "train-images-idx3-ubyte.gz")[:COUNT])
    labels = read_idx(args.folder / "train-labels-idx1-ubyte.gz")[:COUNT].astype(np.int64)
    with atomic_path(args.output) as temporary:
        np.savez_compressed(temporary, images=images, labels=labels)
    size = args.output.stat().st_size
    print(f"{args.output}: {len(images)} images, {size} bytes, sha256 {sha256_file(args.output)}")


if __name__ == "__main__":
    main()
