"""Capacity: what fits on which card, with which context and how many users, and how speed changes under load."""
