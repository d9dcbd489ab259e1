"""Models for the model checker spin: ``python -m tests.models``."""
