"""Scan: finished checkpoints, through the same observer, baselines, judge and sinks as a training loop."""
