"""Files that stand in for something: a kernel's, an installed package's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def put(root: Path, files: Mapping[str, str]) -> str:
    """Write files, by their path below a directory. Returns that directory."""
    for folder in {os.path.dirname(name) for name in files}:
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    for name, text in files.items():
        with open(f"{root}/{name}", "w") as file:
            file.write(text)
    return str(root)


def install_package(site: Path, entry_points: str, **modules: str) -> str:
    """Install a package with these entry points and modules. Returns the directory that belongs on the search path."""
    info = {"METADATA": "Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n", "entry_points.txt": entry_points}
    put(site / "plugins-1.0.dist-info", info)
    return put(site, {f"{name}.py": text for name, text in modules.items()})
