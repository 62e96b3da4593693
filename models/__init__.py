"""Models, registered with timm on import, and the LightningModule that trains them; see README.md beside this file."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
