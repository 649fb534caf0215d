"""One row times a weight of 8-bit or packed codes, read as they are stored: for the decode steps of several methods."""

from comparator.backends.row_matmul.one_row import NOTE, Codes, one_row, plain, runs_on

__all__ = ["NOTE", "Codes", "one_row", "plain", "runs_on"]
