"""Tasks of lm-evaluation-harness, an optional package: loading them, running them through columns, scoring the answers."""
