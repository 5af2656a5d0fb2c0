"""Judge: from maps to verdicts, by pure functions of state.

"Why is this memorized?" is answered by three files: ``findings`` judges one event, ``verdict`` holds the rule, and
``statistic`` compares with the controls.
"""
