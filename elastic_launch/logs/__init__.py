"""The workers' output, on its way to files and to the launcher's own streams."""
