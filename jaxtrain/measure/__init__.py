"""What the devices at hand do: a benchmark of the train step, and the figures of a chip."""
