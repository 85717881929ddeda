"""`fewstep build-lmdb`: data.source -> artifacts/data.lmdb and its manifest artifacts/data.json."""

import os

from fewstep.data.ingest import ingest
from fewstep.data.provide import provide
from fewstep.data.sources import open_source
from fewstep.params import Params
from fewstep.paths import DATA

HELP = "turn data.source into artifacts/data.lmdb"


def run(params: Params) -> None:
    d = params.data
    provide(d)
    source = open_source(d.source, d.resolution, d.channels, d.classes)
    workers = d.workers or os.cpu_count() or 1
    manifest = ingest(
        source,
        DATA,
        workers=workers,
        on_error=d.on_error or "stop",
        class_names=d.class_names,
    )
    skipped = f", {len(manifest['skipped'])} skipped" if manifest["skipped"] else ""
    print(f"build-lmdb: {manifest['images']} images from {source.name} in {DATA}{skipped}")
    if manifest["changed"]:
        changed = ", ".join(f"{count} {change}" for change, count in manifest["changed"].items())
        print(f"build-lmdb: images that decoding changed: {changed}")
    if manifest["note"]:
        print(f"build-lmdb: note: {manifest['note']}")
