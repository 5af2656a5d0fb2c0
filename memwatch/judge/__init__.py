"""Judge: from maps to words, by pure functions of state.

``compared`` sees to it that only what is made of the same terms is compared. ``regions`` finds places, ``calibration``
compares them with controls, ``evidence`` holds the numbers, and ``alerts`` keeps each probe's verdict. ``findings``
does all of it for one event. ``stop`` decides whether training ends.
"""
