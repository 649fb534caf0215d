"""Loading a checkpoint whose packed layers stay packed, for the backends that do so. `quantizer` is imported inside functions: it
needs transformers."""
