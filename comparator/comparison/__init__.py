"""A request → events → the comparison document."""
