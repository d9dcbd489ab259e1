"""Put man pages and completion scripts into the wheel; hatchling runs this."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Generate(BuildHookInterface):  # type: ignore[type-arg]
    """Writes the files into a temporary directory, and tells the wheel of them."""

    PLUGIN_NAME = "custom"
    folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files before the wheel is made."""
        root = Path(self.root)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        sys.path[:0] = [str(root), str(root / "docs" / "tools")]
        from reference import man_pages

        from elastic_launch.cli.completion import script

        sys.dont_write_bytecode = before
        files = {f"man/man1/{name}": text for name, text in man_pages().items()} | {
            "bash-completion/completions/elastic-run": script("bash"),
            "zsh/site-functions/_elastic-run": script("zsh"),
            "fish/vendor_completions.d/elastic-run.fish": script("fish"),
        }
        self.folder = tempfile.mkdtemp()
        for name, text in files.items():
            path = Path(self.folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            build_data["shared_data"][str(path)] = f"share/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder)
