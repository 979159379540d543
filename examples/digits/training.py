"""Trains a module that turns batches into losses: on one process or several, and never in vain.

A run is determined by its configuration, the module's first parameters and its batches. It can be
interrupted and resumed, and gives the same curve bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.digits.checkpoints import load_state, save_state, save_weights, set_aside
from examples.digits.processes import noted_signals, noticed_peers, rank_and_number, sums
from examples.digits.scenes import Batch, mixed_seed

PRECISIONS = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 20  # steps that the loss on the progress bar is the mean of

Losses = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run's curve depends on, beside its module and its batches.

    Attributes:
        steps: how many there are.
        batch: canvases of a step, those of all processes together.
        seed: of whatever is random in the module.
        learning_rate: the highest; it rises to it for the share ``warm_up`` of the steps, in a
            straight line, and falls to 0 along half a cosine.
        weight_decay: of matrices; biases, norms and frequencies do not decay.
        max_gradient: norm that all gradients together are clipped to.
        precision: ``"full"``, that of the parameters, or ``"bfloat16"`` or ``"float16"``, which
            products of matrices are then computed in (autocast).
    """

    steps: int
    batch: int
    seed: int = 0
    learning_rate: float = 2e-3
    warm_up: float = 0.1
    weight_decay: float = 1e-4
    max_gradient: float = 1.0
    precision: str = "full"


class History(NamedTuple):
    """How a run went.

    Attributes:
        losses: of every step, by name, over all its canvases.
        seconds: where the time of a step went, on average, since the run began or was resumed.
        points_per_second: over the same time.
    """

    losses: list[Losses]
    seconds: dict[str, float]
    points_per_second: float


class ConfigError(ValueError):
    """The configuration does not fit the number of processes, or the state to resume."""


class InterruptionError(Exception):
    """The training was asked to stop; its state is saved."""


class DivergenceError(Exception):
    """Predictions, a loss or a gradient are not finite; the last good checkpoint is kept.

    Attributes:
        alone: whether only this process knows, and the others but notice that it is gone.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def train(
    model: nn.Module,
    batches: Callable[[range], Batch],
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    save_every: int = 50,
    metadata: dict[str, str] | None = None,
) -> History:
    """Takes the steps that are left of ``config.steps``, with AdamW.

    If torch.distributed is initialised, each process takes its share of every batch. Losses divided
    by the mean number of objects over the processes (`vicinal.detr.mean_object_count`) make any number
    of processes give the same curve; dropout, which draws for the canvases that a process has,
    makes another one for each.

    Args:
        model: called with a `Batch`, returns losses by name; their sum is minimised.
        batches: makes the canvases of the numbers it is given. Those of step ``s`` begin at
            ``s * config.batch``.
        folder: for ``model.safetensors`` and ``training_state.pt``, each always whole. Those of a
            run that was not finished are renamed.
        resume: go on from the state in ``folder``.
        save_every: steps from one checkpoint to the next. There is one after the first step and
            one after the last.
        metadata: what ``model.safetensors`` says of itself.

    Raises:
        ConfigError: a batch has fewer canvases than there are processes, or the state is of another
            configuration.
        FileNotFoundError: no state to resume from.
        DivergenceError: a loss or a gradient is not finite, or ``model`` raised a ValueError.
        InterruptionError: by SIGINT (Ctrl-C) or SIGTERM.
        PeerError: another process raised one of these.
    """
    rank, n_processes = rank_and_number()
    if config.batch < n_processes:
        raise ConfigError(f"batch: expected at least {n_processes} canvases, got {config.batch}")
    run = _Run(model, config, folder, metadata or {})
    if resume:
        run.resume()
    with noted_signals() as signals, noticed_peers(), run.progress() as progress:
        for step in range(len(run.losses), config.steps):
            first, last = step * config.batch, (step + 1) * config.batch
            batch = batches(range(first + rank, last, n_processes))
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
    """Of ``step``, counted from 0; see `Config`."""
    warm_up = max(1, round(config.warm_up * config.steps))
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / (config.steps - warm_up)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


class _Run:
    """A module, its optimizer and its curve."""

    def __init__(
        self, model: nn.Module, config: Config, folder: Path, metadata: dict[str, str]
    ) -> None:
        self.model, self.config, self.folder, self.metadata = model, config, folder, metadata
        parameters = list(model.parameters())
        self.device, self.dtype = parameters[0].device, parameters[0].dtype
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.autocast = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.losses: list[Losses] = []
        self.saved = False
        self.rank, self.n_processes = rank_and_number()
        self.parallel = DistributedDataParallel(model) if self.n_processes > 1 else model
        self.watch = _Watch(self.device)

    def step(self, step: int, batch: Batch, stop: bool) -> bool:
        """Takes a step; whether any of the processes is to stop."""
        batch = batch.to(self.device, self.dtype)
        self.watch.lap("data")
        # Whatever is random in the module depends on the step alone, not on who computes it: no
        # state to save, and noise of objects is that of one process.
        torch.manual_seed(mixed_seed(self.config.seed, step))
        parts = self._forward(step, batch)
        *values, n_points, n_stop = sums([*parts.values(), len(batch.ink), stop], self.device)
        means = [value / self.n_processes for value in values]
        losses = dict(zip(parts, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise self._diverged(step, f"the loss is not finite ({_named(losses)})")
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
        except ValueError as problem:  # such as predictions that nothing can be matched to
            raise self._diverged(step, str(problem), alone=self.n_processes > 1) from problem
        return parts

    def _update(self, step: int, losses: Losses) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient)
        # To a scaler this says that its scale is too large: it skips the step.
        if not norm.isfinite() and not self.scaler.is_enabled():
            raise self._diverged(step, f"a gradient is not finite (losses: {_named(losses)})")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < 1:  # it began at 2^16 and halves at every step it skips
            raise self._diverged(step, "gradients are not finite at any scale")

    def _diverged(self, step: int, what: str, alone: bool = False) -> DivergenceError:
        place = f"step {step + 1} of {self.config.steps}"
        if alone:
            place += f", on process {self.rank} of {self.n_processes}"
        kept = f"the last good checkpoint is kept in {self.folder}"
        return DivergenceError(f"{place}: {what}; {kept if self.saved else 'none is saved'}", alone)

    def save(self) -> None:
        first, self.saved = not self.saved, True
        if self.rank != 0:
            return
        if first:
            self._keep_unfinished()
        weights = self.model.state_dict()
        state = {
            "config": dataclasses.asdict(self.config),
            "losses": self.losses,
            "model": weights,  # here too, as two files could be of different steps
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_state(self.folder, state)
        save_weights(self.folder, weights, self.metadata)
        self.watch.lap("saving")

    def _keep_unfinished(self) -> None:
        """Moves the checkpoint of a run that can still go on out of the way."""
        from tqdm import tqdm

        try:
            state = load_state(self.folder, torch.device("cpu"))
        except FileNotFoundError:
            return
        done, steps = len(state["losses"]), state["config"]["steps"]
        if done < steps:
            names = " and ".join(path.name for path in set_aside(self.folder))
            tqdm.write(f"{self.folder} held {done} of {steps} steps of a run, now in {names}")

    def resume(self) -> None:
        state = load_state(self.folder, self.device)
        mine, saved = dataclasses.asdict(self.config), state["config"]
        differing = [f"{name} {saved[name]}" for name in mine if saved[name] != mine[name]]
        if differing:
            raise ConfigError(
                f"config: expected what {self.folder} was begun with: {', '.join(differing)}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.losses = state["losses"]
        self.saved = True

    def progress(self) -> Any:
        """The progress bar, of one process."""
        from tqdm import tqdm

        return tqdm(
            total=self.config.steps,
            initial=len(self.losses),
            desc="Training",
            unit="step",
            disable=self.rank != 0,
        )

    def summary(self) -> str:
        recent = [sum(losses.values()) for losses in self.losses[-SHOWN:]]
        loss = sum(recent) / len(recent)
        return f"loss {loss:.2f}, {self.watch.points_per_second:,.0f} points/s"


def _named(losses: Losses) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in losses.items())


class _Watch:
    """Where the time goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.steps = self.points = 0
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the lap before went into ``name``."""
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
