"""A comparison → Plotly figures as plain dicts; plotly itself is not imported."""
