"""A home of their own for verbs that keep compiled programs in the user's cache."""

import pytest


@pytest.fixture(autouse=True, scope="package")
def home(tmp_path_factory):
    """The folder that ~ names."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder
