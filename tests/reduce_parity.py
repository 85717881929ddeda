"""A small copy of the parity vectors: `python tests/reduce_parity.py DIR tests/data/parity`

Keeps every weight exactly and every kind of check, but fewer rows, grids and stops; REDUCED.json
lists what is gone, so that `parity.py` misses nothing silently. The arrays are .npz files, which
`np.load` reads, compressed by LZMA tuned to floats: 10 % less than numpy's own. DDPM++, whose
weights would not fit into 10 MB, is left out; the teacher pickle is kept without its tensors, which
are those of weights_a.npz.
"""

import io
import json
import lzma
import struct
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

LEFT_OUT = [
    "network_ddpmpp.npz",
    "consistency_grids.npz:S8_T1280/*",
    "consistency_grids.npz:S16_T1280/*",
    "consistency_loss.npz:S8_T64/terminal_image/*",
    "consistency_loss.npz:S4_T16/terminal_hop/*",
    "consistency_loss.npz:S4_T16/terminal_image/grad_norm",  # of a mean over all rows
    *(f"frechet.npz:{pair}/*" for pair in (1, 2)),
    *(f"dmd2.npz:backward_simulation/{stop}/*" for stop in (2, 4, 5, 6, 7, 8)),
]

# pattern: rows kept, along which axis; losses that are means over the batch need all inputs
ROWS = {
    "network_adm.npz:churn_noise": (1, 1),
    "network_adm.npz:seed_latents": (2, 0),
    "network_adm.npz:seed_labels": (8, 0),
    "network_adm.npz:labels": (6, 0),
    "network_adm.npz:*latents": (1, 0),
    "network_adm.npz:sample_labels": (1, 0),
    "network_adm.npz:*_steps": (1, 0),
    "network_adm.npz:*": (2, 0),
    "consistency_loss.npz:S8_T64/terminal_hop/x_*": (2, 0),
    "consistency_loss.npz:S8_T64/terminal_hop/target": (2, 0),
    "consistency_loss.npz:S4_T16/*": (5, 0),  # the fifth image is on the terminal edge
    "dmd2.npz:*/grad_*": (2, 0),
    "dmd2.npz:bottleneck": (1, 0),
    "dmd2.npz:sample/*/noise": (1, 1),
    "dmd2.npz:sample/*": (1, 0),
    "dmd2.npz:backward_simulation/*": (1, 0),
}


class FloatLzma(zipfile.LZMACompressor):  # pyright: ignore[reportAttributeAccessIssue]
    """zipfile's LZMA with literals predicted by their place in a 4-byte number."""

    def _init(self) -> bytes:
        chosen = {"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 2, "lp": 2, "pb": 2}
        properties = lzma._encode_filter_properties(chosen)  # pyright: ignore[reportAttributeAccessIssue]
        self._comp = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[chosen])
        return struct.pack("<BBH", 9, 4, len(properties)) + properties


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # without a date: the same bytes every time
            entry.compress_type = zipfile.ZIP_LZMA
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(entry, buffer.getvalue())


def shortened(name: str, array: np.ndarray) -> np.ndarray:
    for pattern, (rows, axis) in ROWS.items():
        if fnmatch(name, pattern) and array.ndim > axis:
            return array[(slice(None),) * axis + (slice(rows),)]
    return array


def hollowed(pickle: bytes, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pickle with zeros for its tensors, and where each is."""
    hollow, names, offsets = bytearray(pickle), [], []
    for name, array in weights.items():
        data = array.tobytes()
        if len(data) > 64:
            offset = pickle.index(data)
            hollow[offset : offset + len(data)] = bytes(len(data))
            names, offsets = [*names, name], [*offsets, offset]
    bytes_ = np.frombuffer(bytes(hollow), np.uint8)
    return {"bytes": bytes_, "names": np.array(names), "offsets": np.array(offsets)}


def main(source: Path, target: Path) -> None:
    zipfile.LZMACompressor = FloatLzma  # pyright: ignore[reportAttributeAccessIssue]
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.npz")):
        if file.name in LEFT_OUT:
            continue
        with np.load(file) as arrays:
            names = {name: f"{file.name}:{name}" for name in arrays.files}
            kept = [n for n, full in names.items() if not any(fnmatch(full, p) for p in LEFT_OUT)]
            save(target / file.name, {name: shortened(names[name], arrays[name]) for name in kept})
    with np.load(source / "weights_a.npz") as weights:
        hollow = hollowed((source / "edm_structure.pkl").read_bytes(), dict(weights))
    save(target / "edm_structure_hollow.npz", hollow)
    (target / "REDUCED.json").write_text(json.dumps({"left_out": LEFT_OUT}, indent=1) + "\n")
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{size / 1e6:.2f} MB in {target}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
