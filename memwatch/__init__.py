"""memwatch: see, during Stable Diffusion fine-tuning, what the model starts to store from its training images, and where."""

from memwatch.callback import MemWatch
from memwatch.config import ConfigError, MemWatchConfig, load_config
from memwatch.probes import Probe, ProbeError
from memwatch.regions import Region
from memwatch.report import Finding, Report

__all__ = [
    "ConfigError",
    "Finding",
    "MemWatch",
    "MemWatchConfig",
    "Probe",
    "ProbeError",
    "Region",
    "Report",
    "load_config",
]
__version__ = "0.1.0"
