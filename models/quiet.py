"""Less talk from the libraries."""

import logging
import warnings


def quiet() -> None:
    """Silence what the libraries say that means nothing here."""
    for name, level in (("pytorch_lightning.utilities.rank_zero", logging.WARNING), ("timm.scheduler", logging.ERROR)):
        logging.getLogger(name).setLevel(level)  # tips and hardware notes; remarks on very short schedules
    for message in (
        ".*LeafSpec.*is deprecated",  # inside Lightning
        ".*smaller than the logging interval",
        "Experiment logs directory .* exists",  # train.log is there already, and the curve is in the checkpoint
        "You're resuming from a checkpoint that ended before",  # our data module knows where it was
    ):
        warnings.filterwarnings("ignore", message=message)
