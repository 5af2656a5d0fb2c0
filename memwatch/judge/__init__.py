"""Judge: from maps to words. ``regions`` finds places, ``calibration`` compares them with controls, ``alerts`` keeps each
probe's verdict, ``findings`` does all three for one event, ``stop`` decides whether training ends. Pure functions of state.
"""
