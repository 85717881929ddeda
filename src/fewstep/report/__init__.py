"""What a run ends in: frames of rows and logs, tables, charts, pictures, and one page with all."""

from fewstep.report.pictures import tile
from fewstep.report.text import format_row

__all__ = ["format_row", "tile"]
