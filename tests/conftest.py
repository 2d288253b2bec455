"""What all tests share."""

from hypothesis import settings

# Machines are shared, and a test is right or wrong however long it takes.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")
