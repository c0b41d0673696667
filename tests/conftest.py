"""Settings of all tests."""

from hypothesis import settings

# the same examples in every run: a red test is news about the change at hand, and busy machines miss deadlines
settings.register_profile("logquant", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=400)  # pytest --hypothesis-profile=search
settings.load_profile("logquant")
