"""Tasks of lm-evaluation-harness, answered by columns and scored by the harness itself. An optional package."""
