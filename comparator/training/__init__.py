"""Training a LoRA on any variant: data, settings, jobs, results. `jobs.py` is the door."""
