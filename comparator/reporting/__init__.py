"""Figures, tables, files, plots and code made from a comparison document. Imports no torch."""
