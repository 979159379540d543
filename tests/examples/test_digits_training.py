"""The training loop: one curve however it is run, and nothing lost when it ends early."""

import dataclasses
import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from started import light_spawn
from test_digits_scenes import strokes
from torch import Tensor, nn

from examples.canvas import load_digits
from examples.digits import model as models
from examples.digits import scenes
from examples.digits.model import DigitDetector
from examples.digits.parts import divide
from examples.digits.scenes import CLASSES, Batch, Scenes, split_digits
from examples.training.checkpoints import (
    STATE,
    WEIGHTS,
    load_state,
    load_weights,
    read_metadata,
    save_state,
)
from examples.training.loop import (
    Config,
    ConfigError,
    DivergenceError,
    History,
    InterruptionError,
    learning_rate,
    train,
)
from examples.training.processes import PeerError, spawn_processes
from vicinal.detr import mean_object_count

CONFIG = Config(steps=6, batch=2, seed=1)
CPU = torch.device("cpu")
DETECTOR_STEPS = 20


class Counter(nn.Module):
    """How many of each digit are on a canvas, guessed from where its ink is."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES)
        )
        self.dtypes: list[torch.dtype] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        points = torch.cat((batch.coordinates[:, 1:] / 512, batch.ink[:, None]), 1)
        features = points.new_zeros(batch.batch_size, 3)
        features = features.index_add(0, batch.coordinates[:, 0], points.to(features.dtype)) / 1000
        guess = self.layers(features)
        self.dtypes.append(guess.dtype)
        image = torch.arange(batch.batch_size).repeat_interleave(batch.box_offsets.diff())
        counts = torch.zeros(batch.batch_size, CLASSES, dtype=points.dtype)
        counts.index_put_((image, batch.labels), points.new_ones(()), accumulate=True)
        n_objects = mean_object_count(len(batch.labels), CPU)
        return {
            "squares": (guess - counts).square().sum() / n_objects,
            "sizes": 0.1 * guess.abs().sum() / n_objects,
        }


class Broken(Counter):
    """Has values that are not finite at a step, of one kind or another."""

    def __init__(self, how: str, step: int, last: int | None = None) -> None:
        super().__init__()
        self.how, self.calls = how, itertools.count()
        self.steps = range(step, (last or step) + 1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().forward(batch)
        if next(self.calls) not in self.steps:
            return losses
        if self.how == "error":
            raise ValueError("predictions: expected finite ones")
        if self.how == "loss":
            return losses | {"sizes": losses["sizes"] * math.nan}
        return losses | {"sizes": (losses["sizes"] * 0).sqrt()}  # of infinite slope


def canvases() -> Callable[[range], Batch]:
    return Scenes(strokes(), seed=0).batch


def signalling(step: int, *signals: int) -> Callable[[range], Batch]:
    def batches(numbers: range) -> Batch:
        if numbers.start == CONFIG.batch * step:
            for number in signals:
                signal.raise_signal(number)
        return canvases()(numbers)

    return batches


def run(folder: Path, model: nn.Module | None = None, **options: object) -> History:
    return train(model or Counter(), canvases(), CONFIG, folder, **options)  # type: ignore[arg-type]


def interrupt(folder: Path, steps: int) -> None:
    with pytest.raises(InterruptionError):
        train(Counter(), signalling(steps - 1, signal.SIGINT), CONFIG, folder)


def test_losses_fall(tmp_path: Path) -> None:
    """On canvases that are always the same."""
    config = Config(steps=60, batch=2, learning_rate=0.1)
    losses = train(Counter(0.0), lambda _: canvases()(range(2)), config, tmp_path).losses
    total = [sum(parts.values()) for parts in losses]
    assert len(total) == 60
    assert sum(total[-10:]) < 0.5 * sum(total[:10])


def test_every_step_has_its_own_canvases(tmp_path: Path) -> None:
    drawn: list[int] = []

    def batches(numbers: range) -> Batch:
        drawn.extend(numbers)
        return canvases()(numbers)

    train(Counter(), batches, CONFIG, tmp_path)
    assert drawn == list(range(CONFIG.steps * CONFIG.batch))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_has_the_same_curve(tmp_path: Path, number: int) -> None:
    whole = Counter()
    expected = run(tmp_path / "whole", whole)

    first = Counter()
    with pytest.raises(InterruptionError):
        train(first, signalling(3, number), CONFIG, tmp_path)
    assert len(load_state(tmp_path, CPU)["losses"]) == 4

    torch.manual_seed(99)
    second = Counter()
    nn.init.zeros_(second.layers[0].weight)  # type: ignore[arg-type]
    resumed = run(tmp_path, second, resume=True)
    assert resumed.losses == expected.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_a_second_interrupt_acts_at_once(tmp_path: Path) -> None:
    # Shells start background processes with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Counter(), signalling(3, signal.SIGINT, signal.SIGINT), CONFIG, tmp_path)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    finished = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.losses == finished.losses
    assert again.points_per_second == 0


def test_resumes_a_run_from_before_a_setting_was_added(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        train(Counter(), signalling(1, signal.SIGINT), CONFIG, tmp_path)
    state = load_state(tmp_path, CPU)
    del state["config"]["betas"]
    save_state(tmp_path, state)
    other = dataclasses.replace(CONFIG, betas=(0.9, 0.98))
    with pytest.raises(ConfigError, match=r"^betas: expected \(0.9, 0.999\).* got \(0.9, 0.98\)$"):
        train(Counter(), canvases(), other, tmp_path, resume=True)
    assert run(tmp_path, resume=True).losses == run(tmp_path / "whole").losses


@pytest.mark.parametrize("how", ["loss", "gradient", "error"])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path: Path, how: str) -> None:
    good = Counter()
    with pytest.raises(InterruptionError):  # after two steps
        train(good, signalling(1, signal.SIGINT), CONFIG, tmp_path / "good")
    with pytest.raises(DivergenceError) as error:
        run(tmp_path, Broken(how, step=3), save_every=2)
    assert error.value.step == 3
    assert not error.value.on_one_process
    assert str(tmp_path) in str(error.value)
    losses = error.value.losses
    if how == "error":
        assert losses == {}
        assert str(error.value.__cause__) in str(error.value)
    else:
        assert math.isfinite(losses["squares"])
        assert math.isnan(losses["sizes"]) if how == "loss" else losses["sizes"] == 0

    assert len(load_state(tmp_path, CPU)["losses"]) == 2
    kept = Counter()
    load_weights(tmp_path, kept)
    for name, value in good.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value)


def test_a_run_that_diverges_at_once_keeps_existing_files(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as error:
        run(tmp_path, Broken("loss", step=0))
    assert error.value.step == 0
    assert str(tmp_path) not in str(error.value)
    assert not list(tmp_path.iterdir())
    interrupt(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DivergenceError):
        run(tmp_path, Broken("loss", step=0))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unfinished_runs_are_renamed_and_the_new_names_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(tmp_path / "whole").losses
    for steps in (2, 3):
        interrupt(tmp_path, steps)
    run(tmp_path)
    printed = capsys.readouterr().out
    for number, steps in ((1, 2), (2, 3)):
        for name in (STATE, WEIGHTS):
            path = tmp_path / name
            renamed = path.with_suffix(f".{number}{path.suffix}")
            assert renamed.name in printed
            renamed.rename(path)
        assert len(load_state(tmp_path, CPU)["losses"]) == steps
        assert run(tmp_path, resume=True).losses == expected
    run(tmp_path)  # over a finished one
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((WEIGHTS, STATE, "whole"))


def test_gradients_that_are_finite_at_no_scale_end_a_run(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=30, precision="float16")
    with pytest.raises(DivergenceError) as error:
        train(Broken("gradient", 3, 30), canvases(), config, tmp_path)
    assert error.value.step == 19  # 2^16 halved 17 times, from step 3 on


def test_weights_have_metadata(tmp_path: Path) -> None:
    run(tmp_path, metadata={"attention": "neighborhood"})
    assert read_metadata(tmp_path) == {"attention": "neighborhood"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((WEIGHTS, STATE))


def test_a_failed_write_leaves_the_file_before(tmp_path: Path) -> None:
    save_state(tmp_path, {"losses": [1.0]})
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises((AttributeError, TypeError, OSError, RuntimeError, ValueError)):
        save_state(tmp_path, {"losses": [2.0], "bad": lambda: None})
    assert (tmp_path / STATE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(tmp_path: Path, precision: str) -> None:
    model = Counter(0.0)
    config = dataclasses.replace(CONFIG, precision=precision)
    losses = train(model, canvases(), config, tmp_path).losses
    assert set(model.dtypes) == {getattr(torch, precision)}
    full = run(tmp_path, Counter(0.0)).losses
    for mixed, exact in zip(losses, full, strict=True):
        assert mixed == pytest.approx(exact, rel=0.02)


def test_the_history_has_the_time_of_each_part(tmp_path: Path) -> None:
    history = run(tmp_path)
    assert history.seconds.keys() == {"data", "forward", "backward", "optimizer", "saving"}
    assert all(seconds > 0 for seconds in history.seconds.values())
    n_points = len(canvases()(range(CONFIG.steps * CONFIG.batch)).ink)
    seconds = CONFIG.steps * sum(history.seconds.values())
    assert history.points_per_second == pytest.approx(n_points / seconds)


def test_learning_rate_rises_and_falls() -> None:
    config = Config(steps=100, batch=1, learning_rate=0.5, warm_up=0.2)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:20] == pytest.approx([0.025 * step for step in range(1, 21)])
    assert rates[20] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(Config(steps=1, batch=1, learning_rate=0.5), 0) == 0.5


def test_refuses_to_resume_a_missing_or_another_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(tmp_path, resume=True)
    run(tmp_path)
    other = dataclasses.replace(CONFIG, batch=3, seed=5)
    expected = r"^--batch: expected 2, as the run in .*, got 3; --seed: expected 1, .* got 5$"
    with pytest.raises(ConfigError, match=expected):
        train(Counter(), canvases(), other, tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"^data: expected None, .* got mine$"):
        train(Counter(), canvases(), CONFIG, tmp_path, resume=True, metadata={"data": "mine"})


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs by two processes, which start once: that takes long."""
    folder = tmp_path_factory.mktemp("by_two")
    with light_spawn():
        spawn_processes(2, _train_by_two, folder)
    return folder


def _train_by_two(device: torch.device, folder: Path) -> None:
    _train_detector(device, folder / "canvas_each")
    _train_detector(device, folder / "shared_canvas", 1, 2)
    _train_broken_on_one(device, folder)


@pytest.mark.parametrize(("name", "n_canvases"), [("canvas_each", 2), ("shared_canvas", 1)])
def test_two_processes_give_the_curve_of_one(
    name: str, n_canvases: int, by_two: Path, tmp_path: Path
) -> None:
    """The detector itself: in float64 none of its choices depends on rounding."""
    expected = _train_detector(CPU, tmp_path, n_canvases).losses
    losses = load_state(by_two / name, CPU)["losses"]
    assert len(losses) == DETECTOR_STEPS
    assert losses[0] != losses[-1]
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_process_that_stops_raises_why_and_the_other_a_peer_error(by_two: Path) -> None:
    error, on_one_process, step, cause = json.loads((by_two / "1").read_text())
    assert (error, on_one_process, step) == ("DivergenceError", True, 3)
    assert cause.startswith("predictions: ")
    assert json.loads((by_two / "0").read_text()) == ["PeerError"]
    assert len(load_state(by_two, CPU)["losses"]) == 1


def _train_broken_on_one(_: torch.device, folder: Path) -> None:
    rank = dist.get_rank()
    try:
        run(folder, Broken("error", step=3) if rank == 1 else Counter())
    except DivergenceError as error:
        fields = [type(error).__name__, error.on_one_process, error.step, str(error.__cause__)]
        (folder / str(rank)).write_text(json.dumps(fields))
    except PeerError as error:
        (folder / str(rank)).write_text(json.dumps([type(error).__name__]))


def small_detector() -> DigitDetector:
    """With few channels and object queries."""
    torch.manual_seed(0)
    with mock.patch.multiple(models, EMBED_DIM=32, QUERIES=20, EVAL_QUERIES=20):
        return DigitDetector()


def _train_detector(
    device: torch.device, folder: Path, n_canvases: int = 2, space: int = 1
) -> History:
    """With a small detector, on canvases with little handwriting, as this takes its time."""
    model = small_detector().double().to(device)
    batches: Callable[[range], Batch] = Scenes(split_digits(load_digits())[0], seed=0).batch
    if space > 1:
        model, batches = divide(model, batches, space)
    with (
        mock.patch.object(scenes, "DIGITS", (1, 3)),
        mock.patch.object(scenes, "FRAGMENTS", (3, 6)),
    ):
        config = Config(steps=DETECTOR_STEPS, batch=n_canvases)
        return train(model, batches, config, folder, space=space)


def test_the_resumed_detector_has_the_same_curve(tmp_path: Path) -> None:
    def go(folder: Path, make: Callable[[range], Batch], resume: bool = False) -> DigitDetector:
        model = small_detector()
        train(model, make, dataclasses.replace(CONFIG, steps=4), folder, resume=resume)
        return model

    whole = go(tmp_path / "whole", canvases())
    with pytest.raises(InterruptionError):
        go(tmp_path, signalling(1, signal.SIGINT))
    assert len(load_state(tmp_path, CPU)["losses"]) == 2
    resumed = go(tmp_path, canvases(), resume=True)
    assert load_state(tmp_path, CPU)["losses"] == load_state(tmp_path / "whole", CPU)["losses"]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
