"""The page: layout, wiring and words. The only package that imports gradio; knows nothing of torch."""
