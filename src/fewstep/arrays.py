"""Arrays as .npz files whose bytes depend on the arrays alone.

numpy.savez makes zipfile write ZIP64 headers, whose bytes differ between patch releases of Python.
The same arrays would then have another sha256 on another machine, and so would everything that
depends on them.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fewstep.files import atomic_path

VERSION = 45  # of the zip format: the first that allows files above 4 GiB


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write a file for `numpy.load`, atomically: uncompressed, in the given order.

    Raises:
        ValueError: an array of objects.
        OSError: the disk is full.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in arrays.items():
            array = np.asanyarray(values)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: no clock
            entry.create_version = entry.extract_version = VERSION
            entry.file_size = array.nbytes + 1024  # zipfile decides by it whether to use ZIP64
            with archive.open(entry, "w") as file:
                npy.write_array(file, array, allow_pickle=False)
