"""`python -m jaxtrain VERB ...`, and the command `jaxtrain VERB ...`, which calls `main` of this module."""

import jaxtrain.early  # noqa: F401  # isort: skip  # before all else: Ctrl-C ends the program from here on
from jaxtrain.cli import main

if __name__ == "__main__":
    main()
