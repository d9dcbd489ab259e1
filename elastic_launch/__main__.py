"""``python -m elastic_launch`` is the same as ``elastic-run``."""

from elastic_launch.cli.main import console

if __name__ == "__main__":
    console()
