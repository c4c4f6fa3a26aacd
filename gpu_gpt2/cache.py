"""The cache folder, for files that can be made again: tokens, kernels built for the emulator."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(name: str) -> Path | None:
    """Returns $XDG_CACHE_HOME/gpu-gpt2/NAME or one in ~/.cache; None if there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(base) / "gpu-gpt2" / name
