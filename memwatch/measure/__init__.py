"""Measure: what a denoiser says about each probe now, without its prompt, and earlier; and the maps made of it.

``curvature`` estimates, ``measurement`` holds what was estimated, ``probes``, ``images`` and ``views`` say where to
look, ``measure`` looks, ``weights`` and ``snapshots`` keep earlier models, ``baselines`` chooses what to compare with,
``observer`` borrows the model and does all of it for every probe. ``signals`` turns measurements into maps.
"""
