"""`fewstep compare A B`: do two rows differ by more than the choice of seeds explains?"""

from argparse import ArgumentParser

from fewstep.params import Params
from fewstep.report.comparison import as_text, differences_frame

HELP = "test whether two rows differ by more than the choice of seeds"


def arguments(parser: ArgumentParser) -> None:
    for side in ("a", "b"):
        parser.add_argument(side, help="a row, or REVISION:ROW of another git revision")


def run(params: Params, a: str, b: str) -> None:
    """Print the differences between A and B, each with its interval and a verdict."""
    print(as_text(differences_frame(params, a, b), a, b))
