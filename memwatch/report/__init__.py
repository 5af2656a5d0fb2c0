"""Report: what people see.

One event goes out: ``report`` holds its numbers and the table of logged keys; ``strip``, ``heatmap``, ``picture``,
``band`` and ``overview`` draw it; ``sinks`` writes it to ``files``, ``losses``, ``tensorboard``, ``wandb``,
``trackers`` and the ``terminal``.

A whole run is read back: ``about``, ``lines`` and ``history`` read its folder; ``advice``, ``chart``, ``timeline`` and
``frames`` make of it what ``page`` and ``text`` show, and ``serve`` keeps the page going.
"""
