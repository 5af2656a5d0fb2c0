"""memwatch in other people's loops. Import the module that you use.

``integrations.transformers`` and ``integrations.lightning`` are callbacks of a ``Trainer``; ``integrations.tracker`` is
for loops that accept nothing but an accelerate tracker. ``integrations.kohya`` and ``integrations.onetrainer`` are run
in place of those trainers' own scripts; ``integrations.ai_toolkit`` is an extension of ai-toolkit, and
``integrations.simpletuner`` a tracker and a post-checkpoint script of SimpleTuner. Their docstrings say what was tried
on a miniature of the trainer's code only.
"""
