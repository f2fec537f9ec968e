"""The configuration of a run: `fields.py`, the fields of its parts beside it, and its JSON.

Nothing here imports jax or anything else that is slow.
"""

from jaxtrain.config.as_json import *  # noqa: F403  # all its names are public
from jaxtrain.config.data_fields import *  # noqa: F403
from jaxtrain.config.fields import *  # noqa: F403
from jaxtrain.config.model_fields import *  # noqa: F403
from jaxtrain.config.objective_fields import *  # noqa: F403
from jaxtrain.config.stage_fields import *  # noqa: F403
from jaxtrain.config.stages import *  # noqa: F403
