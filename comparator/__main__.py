"""`python -m comparator`: see comparator/cli."""

from comparator.cli import main

if __name__ == "__main__":
    main()
