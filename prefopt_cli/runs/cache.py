"""Where prefopt keeps what it can make again."""

import os
from pathlib import Path

import platformdirs

VARIABLE = "PREFOPT_CACHE"
"""Environment variable that names another folder."""


def cache_folder() -> Path:
    """The user's cache folder for prefopt; it may not exist yet."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("prefopt")
