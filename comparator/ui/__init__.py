"""The page: layout, event handlers and texts. The only package that imports gradio; it never imports torch."""
