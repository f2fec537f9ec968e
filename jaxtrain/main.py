"""`python -m jaxtrain.main ...` is `jaxtrain train ...`."""

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain.cli import main

    main("train")
