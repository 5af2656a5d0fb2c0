"""Pick: what to watch of a training set, chosen before training.

Rows (images with captions) -> hashes -> groups (duplicates, shared parts) -> choice (probes, controls, peers, turns).
"""
