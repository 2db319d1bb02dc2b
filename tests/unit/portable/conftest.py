"""How Hypothesis runs here: no time limit per example, since cores are shared; a failure prints how to repeat it."""

from hypothesis import settings

settings.register_profile("unit", deadline=None, print_blob=True)
settings.load_profile("unit")
