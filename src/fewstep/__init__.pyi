# What `fewstep.load` and the others are, for editors and type checkers: __init__.py finds them when
# they are first asked for.

from fewstep.metrics.images import score as score
from fewstep.model import Model as Model
from fewstep.model import load as load

__version__: str
