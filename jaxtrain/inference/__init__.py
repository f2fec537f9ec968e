"""Use a model: logits, scores, and generation with a cache of keys and values, on any mesh."""
