"""`fewstep code`: which code and which settings decide each stage -> artifacts/code, .../settings.

These small files change only when numbers may, and the stages of DVC and rules of Snakemake depend
on them. Snakemake writes them while it reads the Snakefile: a rule would rerun all that follows it.
"""

from fewstep.code import write_identities

HELP = "record which code and settings decide each stage, so that prose reruns nothing"
TAKES_PATH = True


def run(path: str) -> None:
    print(f"code: {len(write_identities(path))} files")
