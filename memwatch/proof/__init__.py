"""Proof: what a caption brings out, held against what memwatch watches.

``prove`` generates for probes that are newly suspicious or memorized, and ``copies`` compares pictures. From when on a
generation counts as a copy is in ``memwatch.judge.copied``.
"""
