"""Training a LoRA on any variant: data, settings, jobs, results. `registry.py` is the entry point."""
