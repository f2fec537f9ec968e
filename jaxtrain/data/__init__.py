"""Data: from files to batches of token ids. `pipeline.open_data` is the way in."""
