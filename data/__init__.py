"""Data sources, one file each. A new one subclasses `ImageDataModule` or `TextDataModule` and adds one YAML to
`configs/data/`."""
