"""The benchmark, and the other scripts behind the published numbers.

``worlds``: what runs train on, what is planted in it, and the models that they start from. ``runs``: one seeded,
resumable fine-tune, what is measured at its events, and how that is read back. ``verdicts``: what memwatch says of a
finished run, against what its generations copy. ``rivals``: what others would have said of the same items. ``pages``:
tables and pictures. ``bench.py`` is the command; ``promise.py`` is the page of ``simulation``.
"""
