"""Judge: from maps to words, by pure functions of state.

``regions`` finds places, ``calibration`` compares them with controls, and ``alerts`` keeps each probe's verdict.
``findings`` does all three for one event. ``stop`` decides whether training ends.
"""
