"""The passes of an event, as counted by a network that counts."""

from __future__ import annotations

import pytest
from support.builders import CONFIG, Loop, picture

from memwatch import Probe
from memwatch.measure.measure import count_passes


class Counter:
    """Counts rows through a network: forward by a hook on its call, backward by one on its input's gradient."""

    def __init__(self, network) -> None:
        self.forward = self.backward = 0
        network.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, kwargs) -> None:
        x = args[0]
        self.forward += len(x)
        if x.requires_grad:
            x.register_hook(lambda grad: setattr(self, "backward", self.backward + len(grad)))

    @property
    def passes(self) -> int:
        return self.forward + self.backward


@pytest.mark.parametrize("screen", [True, False])
def test_the_passes_of_an_event_are_those_that_are_counted(screen, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    probes = [Probe("a cat", picture(0), name="cat"), Probe("a dog", picture(1), name="dog")]
    watch = loop.watch(pipeline, probes=probes, config=CONFIG | {"screen": screen, "full_every": 2})
    counter = Counter(loop.bare)
    counts = []
    for step in range(4):
        before = counter.passes
        watch._event(step)
        counts.append(counter.passes - before)
    expected = count_passes(watch.config, 2, 0)
    assert watch.observer.passes == expected
    screened, full = expected.of_event(), expected.of_event(1)
    late = expected.full  # at the first full event the baseline is measured as well
    assert counts == ([screened, screened, full + late, screened] if screen else [full] * 4)


def test_the_screen_is_cheap():
    from memwatch.config import MemWatchConfig

    assert count_passes(MemWatchConfig(), num_references=28, num_prompts=0).of_event() <= 400
