"""Helpers without domain knowledge: atomic folders, number formatting, statistics, iterating work on threads."""
