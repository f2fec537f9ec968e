"""The verbs of the command `jaxtrain`: each file parses its command line, calls the package, and prints."""
