"""What the devices at hand do: a benchmark of the train step, the figures of a chip, and that no layout changes a result."""
