"""Networks F(x; c_noise, labels), one file each, and the denoiser around them.

A new network is a file here that defines a `Network` of `fewstep.networks.protocol` and ends with
`NETWORK = <its class>`. Its file name is its name in params.yaml (network.type).
"""

import re
from functools import cache
from pathlib import Path


@cache
def names() -> tuple[str, ...]:
    """All values of network.type, sorted. Reads text and imports nothing: torch alone takes 2 s."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(f.stem for f in files if re.search(r"^NETWORK = ", f.read_text(), re.M)))
