"""The parts of the Train tab: settings and data preview, the running job, the trained adapters."""
