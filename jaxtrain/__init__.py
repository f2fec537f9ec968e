"""jaxtrain: a trainer for transformers that outgrow one device. See README.md for the map of the code."""
