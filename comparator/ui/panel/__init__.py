"""The left panel and the header line: model, variants, adapters, prompt, settings, resident variants."""
