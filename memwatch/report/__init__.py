"""Report: one event for people. ``report`` holds the numbers and the table of logged keys, ``heatmap`` draws, ``sinks``
says what a sink is and writes to all of them; ``files``, ``scalars``, ``tensorboard`` and ``wandb`` are the sinks.
"""
