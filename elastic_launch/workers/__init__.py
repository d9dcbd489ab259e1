"""Worker processes: how they are started, signalled and reaped, and how they report errors and timers."""

import os

BOOTSTRAP = os.path.join(os.path.dirname(__file__), "bootstrap.py")
"""The program that runs a Python worker's: ``python -u BOOTSTRAP script|module TARGET ARGUMENT...``."""
