"""Wheels carry compiled kernels, so that the first `medseg infer` is as fast as the second.

They are compiled by the numba that builds, for all kinds of processors of such machines; for an
editable installation into the source tree, and for this machine alone. Without numba, or where
compiling fails, the wheel is one of Python alone, and kernels are compiled at their first call.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AHEAD = "medseg/kernels/ahead"


class CompiledKernels(BuildHookInterface):
    """Compiles, and says which files the wheel gets with that."""

    PLUGIN_NAME = "custom"
    folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; version: 'standard' or 'editable'."""
        if version == "editable":
            self._compiled(Path(self.root, AHEAD))
            return
        self.folder = Path(tempfile.mkdtemp())
        if self._compiled(self.folder, "--all"):
            build_data["force_include"][str(self.folder)] = AHEAD
            build_data["pure_python"] = False
            build_data["infer_tag"] = True  # the code is of this Python and this system

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel has its files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compiled(self, folder: Path, *options: str) -> bool:
        """Whether kernels were compiled into a folder."""
        paths = [self.root, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        command = [sys.executable, "-m", "medseg.kernels.build", "--into", str(folder), *options]
        ran = subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
            self.app.display_warning(f"kernels are not compiled ahead: {reason}")
        return not ran.returncode and any(folder.iterdir())
