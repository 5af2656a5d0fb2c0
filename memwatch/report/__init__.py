"""What people see.

One event goes out: ``report`` holds its numbers and the table of logged keys, ``pictures`` draws it, and ``sinks``
writes it to ``files``, W&B (``wandb``), other trackers and the console. A run is read back by ``history``; ``page`` and
``text`` show it.
"""
