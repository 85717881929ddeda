"""`fewstep build-lmdb`: data.source -> artifacts/data.lmdb."""

from fewstep.data.lmdb import build_lmdb
from fewstep.data.sources import open_source
from fewstep.params import Params
from fewstep.train import DATA


def run(params: Params) -> None:
    d = params.data
    source = open_source(d.source, d.resolution, d.channels, d.classes)
    build_lmdb(source, DATA)
    print(f"build-lmdb: {len(source)} images from {source.name} in {DATA}")
