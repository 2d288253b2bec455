"""What several modules share."""

import pytest

from megatron.remoe.ranks import Ranks


@pytest.fixture(scope="module")
def call():
    """Runs functions in one process that stays: importing Megatron takes longer than the cases.

    Every module has its own, because process groups and their threads add up in it.
    """
    with Ranks(1) as ranks:
        yield lambda *args, **kwargs: ranks.run(*args, **kwargs)[0]
