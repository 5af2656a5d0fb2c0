"""What memwatch says once, at construction, and of the interval that it chooses."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from memwatch.config import MemWatchConfig
from memwatch.measure.observer import Observer
from memwatch.measure.probes import MIN_CONTROLS, Probe
from memwatch.messages import show_messages
from memwatch.pace import RAREST, Pace

logger = logging.getLogger("memwatch")


def say_hello(config: MemWatchConfig, observer: Observer, notes: Sequence[str] = ()) -> None:
    """Name what will be watched, and warn of what will not work; the main process alone speaks.

    Args:
        notes: what a person should know of the choice of probes and controls.
    """
    show_messages()
    if not observer.ranks.accelerator.is_main_process:
        return
    for note in notes:
        logger.info("%s", note)
    c, probes = config, [p.probe for p in observer.probes]
    watched = [probe for probe in probes if not probe.is_control and not probe.is_peer]
    num_references = sum(probe.is_reference for probe in watched)
    if not any(p.requires_grad for p in observer.model.parameters()) and not observer.trains_text:
        found = "neither the model nor a text encoder passed to memwatch has trainable parameters"
        logger.warning("%s; nothing can change", found)
    say_branch(config, observer, len(watched))
    warn_of_controls(probes)
    events = f"overhead {c.overhead:g}" if c.every_steps is None else f"every {c.every_steps} steps"
    logger.info(
        f"{observer.denoiser.name}, {observer.denoiser.schedule.prediction_type}; {num_references} "
        f"reference and {len(watched) - num_references} prompt probes, {sum(p.is_control for p in probes)} controls, "
        f"{sum(p.is_peer for p in probes)} peers; {len(observer.rotation)} rows in the rotation; "
        f"timesteps {c.levels.timesteps}, {c.levels.draws} draws, {c.curvature.vectors} vectors; "
        f"baseline {c.signals.baseline}; {events}; {c.output_dir}"
    )


def say_pace(pace: Pace, config: MemWatchConfig) -> None:
    """How often memwatch will measure, and whether that is more than it was allowed."""
    allowed = f"overhead: {config.overhead:g}"
    if not pace.within:
        how = "fewer probes and controls, or every_steps, change that"
        logger.warning("%s, more than %s allows; %s", pace, allowed, how)
    elif pace.every_steps > RAREST:
        why = f"that is rare, because of {allowed}; a larger one, or every_steps, changes that"
        logger.warning("%s; %s", pace, why)
    else:
        logger.info("%s (%s)", pace, allowed)


def say_branch(config: MemWatchConfig, observer: Observer, num_watched: int) -> None:
    """Say where the unconditional branch is no second baseline, because it says the same as the prompt."""
    if config.signals.against == "snapshot":
        return
    if observer.unconditional is None:
        logger.info("this model has no unconditional branch; only snapshot baselines are used")
        return
    watched = observer.probes[:num_watched]
    if alike := sum(not observer.knows_prompt(p) for p in watched):
        which = f"probes without a caption: {alike} of {num_watched}"
        logger.info("%s; only snapshot baselines are used for them", which)


def warn_of_controls(probes: Sequence[Probe]) -> None:
    """Say which probes have too few controls of their own kind to be judged by."""
    if not any(probe.is_control for probe in probes):
        consequence = "maps are shown, but alerts are uncalibrated and nothing is called memorized"
        logger.warning("there are no controls: %s", consequence)
        return
    for is_reference, kind in ((True, "images"), (False, "prompts")):
        of_kind = [probe for probe in probes if probe.is_reference is is_reference]
        watched = sum(not probe.is_control and not probe.is_peer for probe in of_kind)
        controls = sum(probe.is_control for probe in of_kind)
        if watched and controls < MIN_CONTROLS:
            few = f"there are {controls} controls that are {kind}, and judging {kind} takes {MIN_CONTROLS}"
            logger.warning("%s; the %d probes that are %s will be inconclusive", few, watched, kind)
