"""memwatch: see, during Stable Diffusion fine-tuning, what the model begins to store of its training images, and where.

One event is one straight line, readable in ``event.conduct``:

    due? -> rotate -> screen all -> measure what stands out -> remember -> judge -> prove -> stop -> act -> report

The folders are the way the data takes: ``picking`` -> ``measure`` -> ``judge`` -> ``report`` -> ``act``. ``callback``
keeps the loop's contract and the run's state, ``denoiser`` is the one door to foreign models.
"""

from memwatch.callback import MemWatch
from memwatch.config import ConfigError, MemWatchConfig
from memwatch.config_file import load_config
from memwatch.judge.findings import Finding
from memwatch.measure.captions import ProbeError
from memwatch.measure.probes import Probe
from memwatch.measure.regions import Region
from memwatch.picking.pick import pick
from memwatch.picking.picked import Picked
from memwatch.report.report import Report

__all__ = [
    "ConfigError",
    "Finding",
    "MemWatch",
    "MemWatchConfig",
    "Picked",
    "Probe",
    "ProbeError",
    "Region",
    "Report",
    "load_config",
    "pick",
]
__version__ = "0.1.0"
