"""Log-probabilities of the data under the weights that a run begins with, which preferences are compared with.

They are kept in run_dir/reference (`kept_numbers.py`).
"""

from __future__ import annotations

from jaxtrain.config import to_plain
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.pipeline import Data
from jaxtrain.objectives.dpo import REFERENCE
from jaxtrain.train.gradients import make_score
from jaxtrain.train.kept_numbers import KeptNumbers, Numbers, identity_of
from jaxtrain.train.prepared import Prepared, PyTree

FOLDER = "reference"


def kept_reference(prepared: Prepared, data: Data) -> KeptNumbers:
    """Return where the numbers are kept, and what they depend on."""
    config = prepared.config
    weights = short_hash([to_plain(config.model), config.train.seed, config.init_from, to_plain(config.lora)])
    of = {"data": identity_of(data), "weights": weights}
    return KeptNumbers(config.directory / FOLDER, "", of, {REFERENCE: ()})


def reference_numbers(prepared: Prepared, initial_params: PyTree) -> Numbers:
    """Return what scores a batch with the weights of step 0."""
    score = make_score(prepared.config, prepared.mesh, prepared.backend)
    return lambda batch: {REFERENCE: score(initial_params, batch)}
