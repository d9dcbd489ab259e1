"""Layer 2: worker processes: starting, signalling and burying them."""

import os

BOOTSTRAP = os.path.join(os.path.dirname(__file__), "bootstrap.py")
"""The program under which Python workers run: ``python -u BOOTSTRAP script|module TARGET ARGUMENT...``."""
