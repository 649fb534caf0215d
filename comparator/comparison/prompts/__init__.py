"""Sets of prompts: how they are read, which are shipped, and the checks that a program can decide."""
