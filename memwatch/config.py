"""Configuration: one frozen dataclass per component. ``config_file`` reads them, ``configs/README.md`` lists them.

Every value is checked when it is set. Each docstring line holds meaning, unit and bounds of a key.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

TERMS = ("variance", "loss")
AGAINST = ("snapshot", "unconditional", "both")
LOOKS = ("generation", "last_step")
SCREEN_DRAWS = 1  # noise draws per level of the screen
FULL_EVERY = 8  # events after which curvature is measured on everything once


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and what is allowed."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a ``ConfigError`` unless ``holds``."""
    if not holds:
        raise ConfigError(f"config key '{key}': got {value!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Training rows that ``memwatch.pick`` has not chosen as probes; a few of them are screened per event.

    Attributes:
        rows: how many take part in all, at least 0. They are encoded once, before training.
        per_event: rows that are rotated in at one event, at least 0; rows that stand out stay.
    """

    rows: int = 256
    per_event: int = 8

    def __post_init__(self) -> None:
        for key in ("rows", "per_event"):
            require(getattr(self, key) >= 0, f"rotation.{key}", getattr(self, key), "0 or greater")


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """Noise levels at which probes are measured: reference probes on their image, prompt probes on what they generate.

    Attributes:
        timesteps: diffusion timesteps, increasing, from 0 to the model's last (999). For rectified flow (SD 3, Flux)
            ``sigma = timestep / 1000``.
        draws: noise draws per level, at least 1. With ``sampling.look: last_step``, draws of test vectors for prompt
            probes.
    """

    timesteps: tuple[int, ...] = (501, 801)
    draws: int = 4

    def __post_init__(self) -> None:
        increasing = list(self.timesteps) == sorted(set(self.timesteps))
        ok = len(self.timesteps) > 0 and increasing and min(self.timesteps) >= 0
        require(ok, "levels.timesteps", self.timesteps, "one or more increasing timesteps, 0 or greater")
        require(self.draws >= 1, "levels.draws", self.draws, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """How the diagonal of the Jacobian is estimated.

    Attributes:
        vectors: test vectors per noise draw, at least 1.
        tile: test vectors per block, over ``vectors`` and the noise draws of a level; in the mean over a block
            neighbouring coordinates do not disturb each other. A power of two that divides ``vectors`` or is a multiple
            of it; 1 means independent vectors.
        batch_size: noisy latents per forward pass. When memory runs out, it is halved for the rest of the run. On a GPU
            it is at most the batch size of the guarded dataloader.
    """

    vectors: int = 1
    tile: int = 4
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(self.vectors >= 1, "curvature.vectors", self.vectors, "1 or greater")
        ok = self.tile >= 1 and self.tile & (self.tile - 1) == 0
        ok = ok and max(self.vectors, self.tile) % min(self.vectors, self.tile) == 0
        allowed = f"a power of two that divides curvature.vectors ({self.vectors}) or is a multiple of it"
        require(ok, "curvature.tile", self.tile, allowed)
        require(self.batch_size >= 1, "curvature.batch_size", self.batch_size, "1 or greater")

    @property
    def replicates(self) -> int:
        """Replicates of the retained variance per noise draw: its blocks of test vectors; 1 where blocks span draws."""
        return max(1, self.vectors // self.tile)


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """Which map decides.

    Attributes:
        terms: what is compared. ``loss``: the denoising loss. ``variance``: the freedom that the model leaves a
            coordinate. Prompt probes with ``sampling.look: last_step`` take ``variance``: there the loss is not known.
        against: what it is compared with. ``snapshot``: an earlier model. ``unconditional``: the same model without the
            prompt. ``both``: the smaller of the two, corrected for what the unconditional branch has memorized.
        baseline: the earlier model. ``first``, ``previous``, ``lag:N`` (N events back), ``last_clean`` (the probe's
            last event without evidence), ``base`` (LoRA off) or ``path:FILE`` (safetensors of trainable tensors).
        smooth: side of the mean filter on heatmaps and severities, latent pixels, odd. p rests on maps without it.
    """

    terms: str = "loss"
    against: str = "both"
    baseline: str = "first"
    smooth: int = 3

    def __post_init__(self) -> None:
        require(self.terms in TERMS, "signals.terms", self.terms, ", ".join(TERMS))
        require(self.against in AGAINST, "signals.against", self.against, ", ".join(AGAINST))
        name, argument = self.baseline_parts
        ok = name in ("first", "previous", "last_clean", "base") and not argument
        ok = ok or (name == "path" and bool(argument))
        ok = ok or (name == "lag" and argument.isdecimal() and int(argument) >= 1)
        allowed = "first, previous, lag:N, last_clean, base, path:FILE"
        require(ok, "signals.baseline", self.baseline, allowed)
        require(self.smooth >= 1 and self.smooth % 2 == 1, "signals.smooth", self.smooth, "an odd number, 1 or greater")

    @property
    def baseline_parts(self) -> tuple[str, str]:
        """``lag:3`` is ``("lag", "3")``; without an argument the second item is empty."""
        name, _, argument = self.baseline.partition(":")
        return name, argument

    @property
    def baseline_is_fixed(self) -> bool:
        """Whether the baseline is one set of weights from outside the run, not an earlier event."""
        return self.baseline_parts[0] in ("base", "path")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How prompts are sampled: by DDIM, as in the paper; rectified flow (SD 3, Flux) by Euler steps.

    Attributes:
        look: where prompt probes are measured. ``generation``: the finished generations are noised again, and measured
            as the images of reference probes are. ``last_step``: at the last sampling step, as in the paper; the noise
            there is not known, so there is no loss.
        seeds: generations per prompt probe, with consecutive seeds, pooled into one map; at least 1, rounded down to a
            divisor of ``levels.draws``. With ``last_step`` 1 alone.
        num_inference_steps: sampling steps, at least 2. 15 show the copies that 50 show; the paper takes 50.
        guidance_scale: classifier-free guidance, at least 1; 1 is none. Flux (distilled) and unconditional models take
            none.
    """

    look: str = "generation"
    seeds: int = 4
    num_inference_steps: int = 15
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        require(self.look in LOOKS, "sampling.look", self.look, ", ".join(LOOKS))
        require(self.seeds >= 1, "sampling.seeds", self.seeds, "1 or greater")
        allowed = "1, because sampling.look is last_step"
        require(self.seeds == 1 or self.look == "generation", "sampling.seeds", self.seeds, allowed)
        require(self.num_inference_steps >= 2, "sampling.num_inference_steps", self.num_inference_steps, "2 or greater")
        require(self.guidance_scale >= 1, "sampling.guidance_scale", self.guidance_scale, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """When a probe is suspicious, and when memorized.

    Attributes:
        false_alarms_per_run: the chance that a run in which nothing is stored calls anything memorized, whatever the
            number of probes and events, where the controls' scores are normal; with heavy tails mostly; in (0, 1).
        max_p: largest p-value of a suspicious probe at one event, in (0, 1].
        webhook: where alerts are posted as JSON that Slack and Discord accept: a URL, or ``$NAME`` for the URL in that
            environment variable. Logs and files show its host alone.
    """

    false_alarms_per_run: float = 0.05
    max_p: float = 0.01
    webhook: str | None = None

    def __post_init__(self) -> None:
        rate = self.false_alarms_per_run
        require(0 < rate < 1, "alerts.false_alarms_per_run", rate, "greater than 0, below 1")
        require(0 < self.max_p <= 1, "alerts.max_p", self.max_p, "greater than 0, at most 1")
        url = self.webhook
        ok = url is None or url.startswith(("https://", "http://")) or (url.startswith("$") and url[1:].isidentifier())
        require(ok, "alerts.webhook", None if ok else shown_url(url or ""), "https://..., http://... or $NAME, or null")


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When training is stopped early.

    Attributes:
        enabled: whether memwatch may end the run (through ``guard`` or ``should_stop``).
        num_probes: how many memorized probes it takes, at least 1.
        require_copy: only memorized probes that a generation has copied count, at this event or an earlier one; see
            ``proof``.
    """

    enabled: bool = True
    num_probes: int = 1
    require_copy: bool = False

    def __post_init__(self) -> None:
        require(self.num_probes >= 1, "stop.num_probes", self.num_probes, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class ProofConfig:
    """Proof by generation: does the caption of a suspicious or memorized probe bring out a copy of its region?

    Four generations per caption, sampled as ``sampling`` says, for the four worst probes of an event. Prompt probes
    have their generations already.

    Attributes:
        enabled: whether to generate. The autoencoder then stays in memory.
    """

    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class MemWatchConfig:
    """Everything that can be set. Relative paths are relative to the working directory.

    Attributes:
        every_steps: optimizer steps between events, at least 1; null lets memwatch choose, see ``overhead``.
        overhead: the share of training time that memwatch may take, in (0, 1), when it chooses ``every_steps`` itself.
            It times the first steps and chooses once, see ``memwatch/pace.py``.
        max_train_steps: optimizer steps of the whole run, if known; null otherwise. It plans overhead and false alarms,
            and limits nothing.
        output_dir: where history, maps, pictures, ledger and snapshots go.
        picked: a folder that ``memwatch pick`` has written. The ``picked`` argument replaces it.
        probes: an image folder, a text file with one prompt per line, or a list of prompts, besides those picked. The
            ``probes`` argument replaces it.
        controls: the same, held out from training. Without any controls alerts are uncalibrated.
        resolution: side of probe images in pixels, a multiple of the autoencoder's scale; null takes the model's own.
        seed: of noise draws, test vectors and prompt probes without a seed of their own.
        weights: ``live``, or ``ema`` to watch the averaged weights (needs the ``ema`` argument).
        precision: ``full`` measures in the type of the model's weights, ``loop`` in the mixed precision of the loop's
            accelerator. In bf16 log ratios differ by 0.01 from float32, at most an eighth of their standard error.
        rollback: keep the latest weights saved before any probe was memorized, as diffusers loads them, in
            ``output_dir/last_clean``. They are deleted when the run ends without an alert.
        strict: raise on failures that would otherwise cost an event or a row, with a warning.
    """

    every_steps: int | None = None
    overhead: float = 0.02
    max_train_steps: int | None = None
    output_dir: str = "memwatch"
    picked: str | None = None
    probes: str | tuple[str, ...] | None = None
    controls: str | tuple[str, ...] | None = None
    resolution: int | None = None
    seed: int = 0
    weights: str = "live"
    precision: str = "full"
    rollback: bool = True
    strict: bool = False
    rotation: RotationConfig = field(default_factory=RotationConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    proof: ProofConfig = field(default_factory=ProofConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    def __post_init__(self) -> None:
        for key in ("every_steps", "max_train_steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "1 or greater, or null")
        require(0 < self.overhead < 1, "overhead", self.overhead, "greater than 0, below 1")
        require(bool(self.output_dir), "output_dir", self.output_dir, "a folder's path")
        ok = self.resolution is None or self.resolution >= 8
        require(ok, "resolution", self.resolution, "8 or greater, or null")
        require(self.weights in ("live", "ema"), "weights", self.weights, "live, ema")
        require(self.precision in ("full", "loop"), "precision", self.precision, "full, loop")
        copied = self.stop.require_copy
        require(self.proof.enabled or not copied, "stop.require_copy", copied, "false, because proof.enabled is false")
        self._require_replicates()

    def _require_replicates(self) -> None:
        """Every number that decides needs an error bar, hence two replicates."""
        draws, terms = self.levels.draws, self.signals.terms
        why = "with one block of test vectors (curvature.tile) per draw: one replicate has no error bar"
        require(draws * self.curvature.replicates >= 2, "levels.draws", draws, f"2 or greater {why}")
        why = f"with signals.terms = {terms}: a loss has one replicate per draw"
        require(draws >= 2 or terms == "variance", "levels.draws", draws, f"2 or greater {why}")

    @property
    def screens(self) -> bool:
        """Whether forward passes screen every probe, and curvature is measured only for those that exceed the controls.

        A screen takes the loss term, and a baseline that stays (``first``, ``base``, ``path:FILE``). Without one
        curvature is measured for everything at every event.
        """
        stays = self.signals.baseline_is_fixed or self.signals.baseline_parts[0] == "first"
        has_loss = self.signals.terms != "variance" and self.sampling.look == "generation"
        return stays and has_loss

    def is_full_event(self, number: int) -> bool:
        """Whether the run's event of that number, 0 for the first, measures curvature on everything."""
        return not self.screens or (number > 0 and number % FULL_EVERY == 0)

    @property
    def seeds(self) -> int:
        """Generations of a prompt probe: a divisor of all draws."""
        draws, wanted = self.levels.draws, min(self.sampling.seeds, self.levels.draws)
        return next(n for n in range(wanted, 0, -1) if draws % n == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as YAML would hold it."""
        return asdict(self)

    def to_show(self) -> dict[str, Any]:
        """The same for logs and files, which show of a webhook's URL, a secret, the host alone."""
        plain = self.to_dict()
        if self.alerts.webhook is not None:
            plain["alerts"]["webhook"] = shown_url(self.alerts.webhook)
        return plain


def shown_url(url: str) -> str:
    """A URL less what may be secret in it; ``$NAME`` stays.

    >>> shown_url("https://hooks.example.com/services/T0/B0/x1?key=2")
    'https://hooks.example.com/...'
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/..." if parts.hostname else url if url.startswith("$") else "..."
