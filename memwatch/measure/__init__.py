"""Measure: what a denoiser says about each probe now, without its prompt, and earlier; and the maps made of it.

``observer`` borrows the model and takes every probe from a view to an observation. ``prepare`` (of ``probes`` and
``images``) gets model and probes ready, ``views`` say where to look, ``measure`` and ``curvature`` measure,
``measurement`` holds the result. ``weights`` and ``snapshots`` keep earlier models, ``baselines`` chooses what to
compare with, ``signals`` turns measurements into maps, and ``regions`` are the parts of a map that stand out.
"""
