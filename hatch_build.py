"""Hatchling's hook: the wheel, and a checkout that is installed editable, get compiled kernels.

Without a C++ compiler the package is installed without them, and PyTorch's operators compute."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelsHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compilation = runpy.run_path(
            str(Path(self.root, "llava_interleave/kernels/compilation.py"))
        )
        try:
            found = list(compilation["compile_all"]())
        except compilation["CompileError"] as error:
            self.app.display_warning(f"llava-interleave without compiled kernels: {error}")
            return
        if found and version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
