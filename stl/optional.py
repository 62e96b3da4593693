"""Packages that only some parts of the project need."""

from importlib import import_module
from typing import Any

from stl.errors import SettingError


def optional(package: str, setting: str, remedy: str = "pip install -r requirements-llm.txt") -> Any:
    """Import a package that `setting` needs; raises SettingError, with the remedy, where it is missing."""
    reason: Any = "it is not installed"
    try:
        module = import_module(package)
        if getattr(module, "__file__", None) is not None:  # else a folder that happens to have its name: datasets/
            return module
    except ImportError as error:
        reason = error
    raise SettingError(f"{setting} needs the package {package} ({' '.join(str(reason).split())}): {remedy}")
