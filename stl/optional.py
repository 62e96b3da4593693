"""Packages that only some parts of the project need."""

from importlib import import_module
from typing import Any

from stl.errors import SettingError


def optional(package: str, setting: str) -> Any:
    """Import a package of requirements-llm.txt, which `setting` needs; raises SettingError where it is missing."""
    try:
        module = import_module(package)
    except ImportError as error:
        raise _missing(package, setting, error) from None
    if getattr(module, "__file__", None) is None:  # a folder that happens to have its name, as datasets/ does
        raise _missing(package, setting, "it is not installed")
    return module


def _missing(package: str, setting: str, reason: Any) -> SettingError:
    return SettingError(
        f"{setting} needs the package {package} ({' '.join(str(reason).split())}): pip install -r requirements-llm.txt"
    )
