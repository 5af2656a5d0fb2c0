"""What people see.

One event goes out: ``report`` holds its numbers and the table of logged keys; ``picture`` and ``overview`` draw it, in
the colours of ``heatmap``; ``sinks`` writes it to ``files``, ``tensorboard``, ``wandb``, other ``trackers`` and the
console. A run is read back by ``history``; ``page`` and ``text`` show it.
"""
