"""Data sources, one file each. A new one subclasses `ImageDataModule` and adds one YAML to `configs/data/`."""
