"""Numbers as people write them on a command line: 0-63,100."""

from fewstep.budgets import SEEDS, within
from fewstep.quoting import quoted


def parse(text: str, option: str) -> list[int]:
    """The numbers in a list such as 0-63,100.

    Raises:
        ValueError: the text is not such a list.
    """
    ranges: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"need numbers and ranges such as 0-63,100, got {quoted(text)} ({option})"
            )
        if max(len(first), len(last)) > 19 or int(last or first) >= 2**63:
            raise ValueError(f"need numbers below 2^63, got {quoted(text)} ({option})")
        ranges.append(range(int(first), int(last or first) + 1))
    if not (count := sum(map(_length, ranges))):
        raise ValueError(f"need at least one number, got {text!r} ({option})")
    within(count, SEEDS, f"numbers for {option}")
    return [number for numbers in ranges for number in numbers]


def _length(numbers: range) -> int:
    """As `len`, which raises for ranges beyond 2^63."""
    return max(numbers.stop - numbers.start, 0)
