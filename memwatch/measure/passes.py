"""Passes: what an event costs, in rows that go through the network, forward or backward."""

from __future__ import annotations

from dataclasses import dataclass

from memwatch.config import MemWatchConfig


@dataclass(frozen=True)
class Passes:
    """Network passes of one event, by what they are for. One is one latent through the network, forward or backward.

    Attributes:
        screen: forward only, of every probe, control and peer; 0 without a screen.
        full: what measuring the curvature of all of them costs.
        sampling: what prompt probes generate.
    """

    screen: int
    full: int
    sampling: int

    def of_event(self, chosen: float = 0.0) -> float:
        """An event at which a share ``chosen`` of all is measured with curvature; 1 is a full event."""
        return self.screen + self.sampling + chosen * self.full


def count_passes(config: MemWatchConfig, num_references: int, num_prompts: int, branches: int = 2) -> Passes:
    """The passes of an event.

    Args:
        num_references, num_prompts: reference and prompt probes, controls and peers included.
        branches: 2 where the model without the prompt is looked at as well, else 1.
    """
    levels, sampling = config.levels, config.sampling
    pass
    of_draw = len(levels.timesteps) * branches
    full_rows = of_draw * levels.draws * (1 + config.curvature.vectors)
    twice = 2  # now, and under earlier weights at the noisy latents of today
    screened = of_draw * 1
    return Passes(
        screen=(num_references * screened + num_prompts * twice * of_draw * levels.draws) if config.screens else 0,
        full=(num_references + twice * num_prompts) * full_rows,
        sampling=num_prompts * config.seeds * sampling.num_inference_steps * 2,
    )
