"""The command line of ``elastic-run``."""
