"""Immutable types, settings and the JSON document. Imports no torch and nothing from other packages."""

VERSION = "0.1.0"
