"""Private parts of other libraries, one module per library; each names the release it was written for.

tests/util/compat has a test for each part, which fails when a release moves it. Nothing else touches such names.
"""
