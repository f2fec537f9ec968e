"""The configuration of a run. The fields are in `fields.py`; nothing here imports jax or anything else that is slow."""

from jaxtrain.config.fields import *  # noqa: F403  # all its names are public
