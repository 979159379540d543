"""The rotation at large coordinates: angles are exact on every back end, near and far."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from problems import assert_close
from torch import Tensor

from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend

# The interpreter computes with NumPy, which warns about numbers that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

HEADS, PAIRS = 2, 5
BACKENDS = ["reference", "cpu", "triton"]  # the last one interpreted, where there is no GPU


def device_of(backend: BackendName) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def rotated_with_gradients(
    backend: BackendName, x: Tensor, coordinates: Tensor, frequencies: Tensor
) -> list[Tensor]:
    """The rotation and the gradients of x, coordinates and frequencies, on the CPU."""
    device = device_of(backend)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in (x, coordinates, frequencies)]
    out = choose_backend(backend, device, x.dtype).rotate(*leaves)
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(x.shape, generator=generator).to(out)
    return [part.detach().cpu() for part in (out, *torch.autograd.grad(out, leaves, cotangent))]


def exact_rotation(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """The rotation in float64, of angles that are summed as fractions and reduced as decimals."""
    turn = Decimal("6.283185307179586476925286766559005768394338798750211641949889")
    out = torch.empty(x.shape, dtype=torch.float64)
    for n, head, pair in torch.cartesian_prod(*map(torch.arange, (len(x), HEADS, PAIRS))).tolist():
        column = frequencies[:, head % frequencies.shape[1], pair]
        pairs = zip(coordinates[n].tolist(), column.tolist(), strict=True)
        total = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
        angle = float((Decimal(total.numerator) / Decimal(total.denominator)) % turn)
        even, odd = x[n, head, 2 * pair : 2 * pair + 2].tolist()
        out[n, head, 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        out[n, head, 2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out


def problem(far: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, coordinates near ``far`` that float32 holds, and frequencies with exact products."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, HEADS, 2 * PAIRS, generator=generator).to(dtype)
    cells = far + 256 * torch.randint(64, (20, 2), generator=generator)
    coordinates = torch.cat((cells, torch.randint(4, (20, 1), generator=generator)), 1)
    frequencies = torch.randint(-1024, 1024, (3, HEADS, PAIRS), generator=generator) / 1024
    return x, coordinates.to(torch.float32), frequencies.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [10, 20, 25, 30])
def test_float32_is_as_exact_far_away_as_near_the_origin(
    backend: BackendName, exponent: int
) -> None:
    x, coordinates, frequencies = problem(2.0**exponent, torch.float32)
    out, grad_x, *_ = rotated_with_gradients(backend, x, coordinates, frequencies)
    assert out.dtype == torch.float32
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    # Three roundings of numbers of up to 4.
    assert_close(out.double(), exact_rotation(x, coordinates, frequencies), 1e-6)
    assert_close(grad_x.double(), exact_rotation(cotangent, coordinates, -frequencies), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_round_the_result_alone(backend: BackendName, dtype: torch.dtype) -> None:
    x, coordinates, frequencies = problem(2.0**30, dtype)
    out, grad_x, *_ = rotated_with_gradients(backend, x, coordinates, frequencies)
    assert out.dtype == grad_x.dtype == dtype
    exact = exact_rotation(x.double(), coordinates, frequencies)
    assert_close(out.double(), exact, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("coordinate_dtype", [torch.float32, torch.float64])
def test_float64_far_away(backend: BackendName, coordinate_dtype: torch.dtype) -> None:
    x, coordinates, _ = problem(2.0**30, torch.float64)
    coordinates = coordinates.to(coordinate_dtype)
    frequencies = torch.rand(3, 1, PAIRS, dtype=torch.float64) * 2 - 1  # products are rounded
    out, *_ = rotated_with_gradients(backend, x, coordinates, frequencies)
    assert_close(out, exact_rotation(x, coordinates, frequencies), 1e-6)
    coordinates[:, :2] -= 2.0**30
    near, *_ = rotated_with_gradients(backend, x, coordinates, frequencies)
    assert_close(near, exact_rotation(x, coordinates, frequencies), 1e-10)


def test_a_float64_rotation_by_float32_coordinates_is_the_same_on_every_back_end() -> None:
    x, coordinates, frequencies = problem(1e6, torch.float64)
    frequencies = frequencies.double() / 3
    ours, theirs = (
        rotated_with_gradients(name, x, coordinates, frequencies) for name in ("cpu", "reference")
    )
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == right.dtype
        assert_close(left, right, 1e-8 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_coordinates_and_frequencies(backend: BackendName) -> None:
    """Those of coordinates are exact far away; those of frequencies to the largest product."""
    x, coordinates, frequencies = problem(2.0**30, torch.float32)
    *_, grad_coordinates, grad_frequencies = rotated_with_gradients(
        backend, x, coordinates, frequencies
    )
    *_, exact_coordinates, exact_frequencies = rotated_with_gradients(
        "reference", x.double(), coordinates.double(), frequencies.double()
    )
    assert grad_coordinates.dtype == grad_frequencies.dtype == torch.float32
    assert_close(grad_coordinates.double(), exact_coordinates, 2e-5)
    assert_close(grad_frequencies.double(), exact_frequencies, 2.0**30 * 20 * 16 * 2.0**-24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend: BackendName) -> None:
    x, coordinates, frequencies = problem(2.0**20, torch.float32)
    whole = rotated_with_gradients(backend, x, coordinates, frequencies)[0]
    coordinates[1::2] *= 512
    coordinates[3] = math.inf
    apart = rotated_with_gradients(backend, x, coordinates, frequencies)[0]
    assert torch.equal(apart[::2], whole[::2])
    assert apart[3].isnan().all()
    some = rotated_with_gradients(backend, x[4:9], coordinates[4:9], frequencies)[0]
    assert torch.equal(some, apart[4:9])
