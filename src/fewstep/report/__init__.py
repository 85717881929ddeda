"""What a run ends in: tables, figures, and one page with all of them.

Pure functions: they take rows, samples and logs that are already loaded, and write files.
"""

from fewstep.report.figures import tile
from fewstep.report.tables import format_row

__all__ = ["format_row", "tile"]
