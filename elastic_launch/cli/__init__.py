"""The command line of ``elastic-run``: its options, and the program."""
