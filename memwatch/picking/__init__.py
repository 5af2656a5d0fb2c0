"""Pick: what to watch of a training set, chosen before training.

Rows -> hashes -> groups (duplicates, shared parts) -> choice (probes, controls, rows in rotation).
"""
