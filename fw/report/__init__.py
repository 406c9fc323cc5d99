"""One HTML file that shows a run, and the same figures as text for the terminal."""

from fw.report.page import write
from fw.report.terminal import table
from fw.report.text import number, percent, seconds, size

__all__ = ["number", "percent", "seconds", "size", "table", "write"]
