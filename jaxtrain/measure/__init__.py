"""Measurements on the devices at hand: a benchmark of the train step, a chip's figures, and that no layout changes a result."""
