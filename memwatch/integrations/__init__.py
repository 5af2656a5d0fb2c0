"""memwatch in other people's loops. Import the module that you use.

``integrations.transformers`` and ``integrations.lightning`` are callbacks of a ``Trainer``; ``integrations.tracker`` is
for loops that accept nothing but an accelerate tracker. For every other trainer, ``memwatch scan --follow`` looks at
the checkpoints that it saves.
"""
