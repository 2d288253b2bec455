"""What several modules share."""

import pytest

from megatron.remoe.ranks import Ranks


@pytest.fixture(scope="session")
def call():
    """Runs functions in one process that stays: importing Megatron takes longer than the cases."""
    with Ranks(1) as ranks:
        yield lambda *args, **kwargs: ranks.run(*args, **kwargs)[0]
