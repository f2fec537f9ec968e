"""The configuration of a run: `fields.py` and `model_fields.py`. Nothing here imports jax or anything else that is slow."""

from jaxtrain.config.fields import *  # noqa: F403  # all its names are public
from jaxtrain.config.model_fields import *  # noqa: F403
