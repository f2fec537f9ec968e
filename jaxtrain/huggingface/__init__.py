"""HuggingFace folders in and out: translate configs and weights of the families in `families/`."""
