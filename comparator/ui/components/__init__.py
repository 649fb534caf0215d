"""One file per part of the page: layout, callbacks, wiring."""
