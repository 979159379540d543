"""Training loop for a module that maps batches to losses, on one process or several.

A run is determined by its configuration, the module's initial parameters and its batches. A run
that is interrupted and resumed has bit-identical losses.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.training.checkpoints import (
    STATE,
    CheckpointError,
    DamagedFileError,
    load_state,
    rename_existing,
    save_state,
    save_weights,
)
from examples.training.processes import (
    all_reduce_sums,
    deferred_signals,
    peer_errors,
    rank_and_world_size,
)
from examples.training.seeds import derive_seed

PRECISIONS = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = ("steps", "batch", "seed", "precision")  # of the command line, as in `Config`
SMOOTHED = 20  # steps that the loss in the progress bar is averaged over

Losses = dict[str, float]


class Batch(Protocol):
    """Some scenes, such as canvases of handwriting, with what is to be learned of them."""

    @property
    def n_points(self) -> int:
        """The number of their points."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Copies them to ``device``, what is floating in ``dtype``."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run besides its module and its batches.

    Attributes:
        steps: number of training steps.
        batch: scenes per step, over all processes.
        seed: of random operations in the module, such as dropout.
        learning_rate: the maximum, reached by linear warm-up and followed by cosine decay to 0.
        warm_up: fraction of the steps with linear warm-up.
        weight_decay: of matrices; biases, norms and frequencies have no weight decay.
        betas: decay rates of AdamW's running means of gradients and of their squares.
        max_gradient: the gradient is clipped to this norm.
        precision: ``"full"``, the precision of the parameters, or ``"bfloat16"`` or ``"float16"``
            for mixed precision (autocast).
    """

    steps: int
    batch: int
    seed: int = 0
    learning_rate: float = 2e-3
    warm_up: float = 0.1
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_gradient: float = 1.0
    precision: str = "full"


class History(NamedTuple):
    """Losses and speed of a run.

    Attributes:
        losses: of every step, by name, averaged over its scenes.
        seconds: mean time per step of each part, since the run started or was resumed.
        points_per_second: throughput over the same time.
    """

    losses: list[Losses]
    seconds: dict[str, float]
    points_per_second: float


class ConfigError(ValueError):
    """The configuration does not fit the number of processes or the checkpoint."""


class InterruptionError(Exception):
    """Training was interrupted by a signal; its state is saved."""


class DivergenceError(Exception):
    """Predictions, a loss or a gradient are not finite; the last good checkpoint is kept.

    Attributes:
        step: the step, counted from 0.
        losses: of this step, empty if they were not computed.
        on_one_process: whether it occurred on this process only; the others raise a `PeerError`.
    """

    def __init__(
        self, message: str, step: int, losses: Losses | None = None, on_one_process: bool = False
    ) -> None:
        super().__init__(message)
        self.step, self.losses = step, losses or {}
        self.on_one_process = on_one_process


def train(
    model: nn.Module,
    batches: Callable[[range], Batch],
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    save_every: int = 50,
    metadata: dict[str, str] | None = None,
    space: int = 1,
) -> History:
    """Trains with AdamW for the remaining steps of ``config.steps``.

    If torch.distributed is initialized, each process takes its share of every batch. With losses
    that are divided by the mean number of objects per process (`vicinal.detr.mean_object_count`),
    the losses of a run do not depend on the number of processes, unless there is dropout, whose
    random numbers depend on how scenes are distributed.

    Args:
        model: maps a batch to losses by name; their sum is minimized.
        batches: generates the scenes with the given numbers. The first scene of step ``s`` is
            ``s * config.batch``.
        folder: for ``model.safetensors`` and ``training_state.pt``, which are replaced atomically.
            Files of an unfinished run, and files that cannot be read, are renamed. Two runs in one
            folder would replace each other's files; `examples.training.folder.lock_folder` prevents
            it.
        resume: resume from the state in ``folder``.
        save_every: steps between checkpoints. The first and the last step are always saved.
        metadata: for the header of ``model.safetensors``.
        space: how many processes, of consecutive ranks, share each scene. ``batches`` returns the
            own part of it, and the mean of their losses is the loss of the scene.

    Raises:
        ConfigError: a batch has fewer scenes than there are processes, or groups of processes
            that share them, or the checkpoint was written with another configuration or metadata.
        FileNotFoundError: there is no checkpoint to resume from.
        CheckpointError: the checkpoint to resume from is damaged, or of another version or model.
        WriteError: a checkpoint cannot be written; the one before is kept.
        DivergenceError: a loss or a gradient is not finite, or ``model`` raised a ValueError.
        InterruptionError: SIGINT (Ctrl-C) or SIGTERM was received.
        PeerError: another process raised one of these.
    """
    rank, n_processes = rank_and_world_size()
    number, n_shares = rank // space, n_processes // space
    if config.batch < n_shares:
        raise ConfigError(f"--batch: expected at least {n_shares} scenes, got {config.batch}")
    run = _Run(model, config, folder, metadata or {})
    if resume:
        run.resume()
    with deferred_signals() as signals, peer_errors(), run.progress() as progress:
        for step in range(len(run.losses), config.steps):
            first, last = step * config.batch, (step + 1) * config.batch
            batch = batches(range(first + number, last, n_shares))
            stop = run.step(step, batch, bool(signals)) and step + 1 < config.steps
            due = (step + 1) % save_every == 0 or step + 1 == config.steps
            if stop or due or not run.saved:
                run.save()
            progress.set_postfix_str(run.summary(), refresh=False)
            progress.update()
            if stop:
                raise InterruptionError(f"interrupted after step {step + 1} of {config.steps}")
    return History(run.losses, run.watch.per_step(), run.watch.points_per_second)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of ``step``, counted from 0; see `Config`."""
    warm_up = max(1, round(config.warm_up * config.steps))
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / (config.steps - warm_up)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


class _Run:
    """A module, its optimizer and its losses so far."""

    def __init__(
        self, model: nn.Module, config: Config, folder: Path, metadata: dict[str, str]
    ) -> None:
        self.model, self.config, self.folder, self.metadata = model, config, folder, metadata
        self.parameters = list(model.parameters())
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            weight_decay=config.weight_decay,
            betas=config.betas,
            fused=True,
        )
        self.autocast = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.losses: list[Losses] = []
        self.saved = False
        self.rank, self.n_processes = rank_and_world_size()
        self.parallel = DistributedDataParallel(model) if self.n_processes > 1 else model
        self.watch = _Stopwatch(self.device)

    def step(self, step: int, batch: Batch, stop: bool) -> bool:
        """Takes a training step; returns whether any process has to stop."""
        batch = batch.to(self.device, self.dtype)
        self.watch.lap("data")
        # Seeded per step, random operations need no state in checkpoints, and denoising noise is
        # the same on any number of processes.
        torch.manual_seed(derive_seed(self.config.seed, step))
        parts = self._forward(step, batch)
        *values, n_points, n_stop = all_reduce_sums(
            [*parts.values(), batch.n_points, stop], self.device
        )
        means = [value / self.n_processes for value in values]
        losses = dict(zip(parts, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise self._diverged(step, "the loss is not finite", losses)
        self.watch.lap("forward")
        self.optimizer.zero_grad()
        self.scaler.scale(torch.stack(list(parts.values())).sum()).backward()
        self.watch.lap("backward")
        self._update(step, losses)
        self.losses.append(losses)
        self.watch.lap("optimizer")
        self.watch.count(int(n_points))
        return n_stop > 0

    def _forward(self, step: int, batch: Batch) -> dict[str, Tensor]:
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                parts: dict[str, Tensor] = self.parallel(batch)
        except ValueError as problem:  # such as predictions that are not finite
            raise self._diverged(step, str(problem)) from problem
        return parts

    def _update(self, step: int, losses: Losses) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient)
        # With a scaler, a gradient that is not finite means that the scale is too large.
        if not norm.isfinite() and not self.scaler.is_enabled():
            raise self._diverged(step, "a gradient is not finite", losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < 1:  # from 2^16, halved at every skipped step
            raise self._diverged(step, "gradients are not finite at any scale", losses)

    def _diverged(self, step: int, what: str, losses: Losses | None = None) -> DivergenceError:
        """The error to raise; without ``losses``, the other processes do not know of it."""
        where = f"step {step + 1} of {self.config.steps}"
        on_one_process = losses is None and self.n_processes > 1
        if on_one_process:
            where += f", on process {self.rank} of {self.n_processes}"
        if losses is not None:
            what += f" ({', '.join(f'{name} {value:.3g}' for name, value in losses.items())})"
        kept = f"the last good checkpoint is in {self.folder}" if self.saved else "no checkpoint"
        return DivergenceError(f"{where}: {what}; {kept}", step, losses, on_one_process)

    def save(self) -> None:
        """Writes a checkpoint, from the first process only."""
        first, self.saved = not self.saved, True
        if self.rank != 0:
            return
        weights = self.model.state_dict()
        state = {
            "config": dataclasses.asdict(self.config),
            "metadata": self.metadata,
            "losses": self.losses,
            "model": weights,  # repeated, since the two files may be of different steps
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_state(self.folder, state, self._keep_existing_run if first else None)
        save_weights(self.folder, weights, self.metadata)
        self.watch.lap("saving")

    def _keep_existing_run(self) -> None:
        """Renames a checkpoint that is not finished or cannot be read, so that it is kept."""
        from tqdm import tqdm

        damaged = False
        try:
            state = load_state(self.folder, torch.device("cpu"))
            done, steps = len(state["losses"]), state["config"]["steps"]
            if done >= steps:
                return
            what = f"an unfinished run of {done} of {steps} steps"
        except FileNotFoundError:
            return
        except CheckpointError as problem:
            damaged = isinstance(problem, DamagedFileError)
            what = "a damaged checkpoint" if damaged else "a checkpoint of another version"
        names = " and ".join(path.name for path in rename_existing(self.folder, damaged))
        tqdm.write(f"Renamed {what} in {self.folder}: {names}")

    def resume(self) -> None:
        """Loads the checkpoint."""
        state = load_state(self.folder, self.device)
        # A state from before a setting was added was trained with its default.
        fields = dataclasses.fields(Config)
        defaults = {x.name: x.default for x in fields if x.default is not dataclasses.MISSING}
        self._check_same(dataclasses.asdict(self.config), {**defaults, **state["config"]})
        self._check_same(self.metadata, state["metadata"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            path = self.folder / STATE
            raise CheckpointError(f"{path}: expected a state of this model: {error}") from error
        self.losses = state["losses"]
        self.saved = True

    def _check_same(self, mine: dict[str, Any], saved: dict[str, Any]) -> None:
        run = f"as the run in {self.folder}"
        differing = [
            f"{_argument(name)}: expected {saved.get(name)}, {run}, got {given}"
            for name, given in mine.items()
            if saved.get(name) != given
        ]
        if differing:
            raise ConfigError("; ".join(differing))

    def progress(self) -> Any:
        """A progress bar, shown by the first process."""
        from tqdm import tqdm

        return tqdm(
            total=self.config.steps,
            initial=len(self.losses),
            desc="Training",
            unit="step",
            disable=self.rank != 0,
        )

    def summary(self) -> str:
        """The smoothed loss and the throughput, for the progress bar."""
        recent = [sum(losses.values()) for losses in self.losses[-SMOOTHED:]]
        loss = sum(recent) / len(recent)
        return f"loss {loss:.2f}, {self.watch.points_per_second:,.0f} points/s"


def _argument(name: str) -> str:
    """What the command line calls a setting, where it has an option for it."""
    return f"--{name}" if name in OPTIONS else name


class _Stopwatch:
    """Measures the time of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.steps = self.points = 0
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the previous lap to the part ``name``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def count(self, points: int) -> None:
        self.steps += 1
        self.points += points

    def per_step(self) -> dict[str, float]:
        return {name: seconds / max(self.steps, 1) for name, seconds in self.seconds.items()}

    @property
    def points_per_second(self) -> float:
        return self.points / max(sum(self.seconds.values()), 1e-9)
