"""jaxtrain: a trainer for transformers that outgrow one device. README.md has the map of the code."""
