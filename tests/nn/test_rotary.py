"""Rotary positions against rotations of complex numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import assert_close, rotate_by_hand
from torch import Tensor

from vicinal import RotaryEncoding
from vicinal._utils.types import BackendName

PATTERNS = ["single", "partition", "closure"]


def encoding(head_dim: int = 12, n_heads: int = 3, position_dim: int = 2, **options: Any) -> Any:
    return RotaryEncoding(head_dim, n_heads, position_dim, **options).double()


def inputs(rotary: RotaryEncoding, n: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, rotary.n_heads, rotary.head_dim, dtype=torch.float64)
    coordinates = torch.rand(n, rotary.position_dim + 1, dtype=torch.float64) * 40 - 10
    return x.requires_grad_(), coordinates.requires_grad_()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [0, 1, 70])
def test_against_complex_numbers(
    pattern: str, share_heads: bool, position_dim: int, n_rows: int, backend: BackendName
) -> None:
    rotary = encoding(
        position_dim=position_dim,
        freq_group_pattern=pattern,
        share_heads=share_heads,
        backend=backend,
    )
    x, coordinates = inputs(rotary, n_rows)
    leaves = [x, coordinates, *rotary.parameters()]
    actual, expected = rotary(x, coordinates), rotate_by_hand(rotary, x, coordinates)
    assert_close(actual, expected, 1e-13)
    weights = torch.randn_like(expected)
    actual_grads = torch.autograd.grad((actual * weights).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    for left, right in zip(actual_grads, expected_grads, strict=True):
        assert_close(left, right, 1e-11)


@pytest.mark.parametrize("head_dim", [2, 4, 6, 8, 10, 14, 32, 34, 64, 130])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_unequal_groups(head_dim: int, pattern: str, backend: BackendName) -> None:
    rotary = encoding(
        head_dim,
        freq_group_pattern=pattern,
        enforce_freq_groups_equal=False,
        backend=backend,
    )
    n_groups, pairs = len(rotary.freqs), head_dim // 2
    share, rest = divmod(pairs, n_groups)
    coordinates_of = {"single": [3], "partition": [2, 1], "closure": [2, 1, 3]}[pattern]
    assert [tuple(f.shape) for f in rotary.freqs] == [
        (n, 3, share + (group < rest)) for group, n in enumerate(coordinates_of)
    ]
    x, coordinates = inputs(rotary)
    assert_close(rotary(x, coordinates), rotate_by_hand(rotary, x, coordinates), 1e-13)
    if rest:
        with pytest.raises(ValueError, match=r"head_dim.*: expected .* equal frequency groups"):
            encoding(head_dim, freq_group_pattern=pattern)
    else:
        encoding(head_dim, freq_group_pattern=pattern)


def test_a_rotation_by_hand() -> None:
    rotary = encoding(4, 1, 1)
    with torch.no_grad():
        table = [[[math.pi / 2, 0.0]], [[0.0, math.pi]]]
        rotary.freqs[0].copy_(torch.tensor(table, dtype=torch.float64))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    rotated = rotary(x, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    expected = torch.tensor([[[-2.0, 1.0, -3.0, -4.0]]], dtype=torch.float64)
    assert_close(rotated, expected, 1e-15)


def test_products_depend_on_differences_alone(backend: BackendName) -> None:
    rotary = encoding(backend=backend)
    (q, at_q), (k, at_k) = inputs(rotary), inputs(rotary)
    shift = torch.tensor([3.5, -20.0, 1.0], dtype=torch.float64)
    before = (rotary(q, at_q) * rotary(k, at_k)).sum(-1)
    after = (rotary(q, at_q + shift) * rotary(k, at_k + shift)).sum(-1)
    assert_close(before, after, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share_heads", [False, True])
def test_gradcheck(pattern: str, share_heads: bool, backend: BackendName) -> None:
    rotary = encoding(
        6,
        2,
        freq_group_pattern=pattern,
        share_heads=share_heads,
        enforce_freq_groups_equal=False,
        backend=backend,
    )
    x, coordinates = inputs(rotary, 3)

    def rotate(x: Tensor, coordinates: Tensor, *freqs: Tensor) -> Tensor:
        named = {f"freqs.{group}": f for group, f in enumerate(freqs)}
        rotated: Tensor = torch.func.functional_call(rotary, named, (x, coordinates))
        return rotated

    leaves = (x, coordinates, *[f.detach().requires_grad_() for f in rotary.freqs])
    assert torch.autograd.gradcheck(rotate, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(rotate, leaves)


def test_a_second_derivative_of_the_kernel_is_refused() -> None:
    rotary = encoding(backend="cpu")
    x, coordinates = inputs(rotary)
    rotated = rotary(x, coordinates)
    (grad,) = torch.autograd.grad(rotated.pow(3).sum(), coordinates, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.usefixtures("restored_threads")
def test_the_same_bits_for_any_number_of_threads() -> None:
    rotary = encoding(32, 4, backend="cpu").float()
    x, coordinates = (y.detach().float().requires_grad_() for y in inputs(rotary, 3000))
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        rotated = rotary(x, coordinates)
        leaves = [x, coordinates, *rotary.parameters()]
        results.append((rotated, *torch.autograd.grad(rotated.sin().sum(), leaves)))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert torch.equal(left, right)


@pytest.mark.usefixtures("uninitialized_is_nan")
def test_uninitialized_memory_is_not_read_or_returned(backend: BackendName) -> None:
    rotary = encoding(10, backend=backend)
    x, coordinates = inputs(rotary)
    rotated = rotary(x, coordinates)
    assert_close(rotated, rotate_by_hand(rotary, x, coordinates), 1e-13)
    grads = torch.autograd.grad(rotated.sum(), [x, coordinates, *rotary.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


# -------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighboring_cells_far_from_the_origin(dtype: torch.dtype, backend: BackendName) -> None:
    # bfloat16 cannot tell cell 300 from 301, nor float16 cell 3000 from 3001.
    rotary = encoding(backend=backend)
    cells = torch.tensor([[300.5, 3000.5, 1], [301.5, 3001.5, 2]], dtype=torch.float32)
    x = torch.randn(2, 3, 12).to(dtype)
    rotated = rotary.float()(x, cells)
    assert rotated.dtype == dtype
    expected = rotate_by_hand(rotary.double(), x.double(), cells.double())
    # A rounding of the result, and in float32 that of an angle of thousands of radians.
    assert_close(rotated.double(), expected, 4 * torch.finfo(dtype).eps + 2e-3)
    confused = rotate_by_hand(rotary, x.double(), cells.bfloat16().double())
    assert (confused - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_coordinates_are_computed_with_in_float32(
    dtype: torch.dtype, backend: BackendName
) -> None:
    rotary = encoding(backend=backend).float()
    coordinates = (torch.rand(20, 3) * 100).to(dtype)
    x = torch.randn(20, 3, 12)
    assert torch.equal(rotary(x, coordinates), rotary(x, coordinates.float()))


def test_autocast_changes_nothing(backend: BackendName) -> None:
    rotary = encoding(backend=backend).float()
    coordinates, x = torch.rand(20, 3) * 1000, torch.randn(20, 3, 12)
    expected = rotary(x, coordinates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotary(x, coordinates), expected)


@pytest.mark.parametrize("far", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_angles(far: float, dtype: torch.dtype, backend: BackendName) -> None:
    rotary = encoding(32, backend=backend).to(dtype)
    x = torch.randn(50, 3, 32, dtype=dtype)
    coordinates = (torch.rand(50, 3, dtype=dtype) * 2 - 1) * far
    rotated = rotary(x, coordinates)
    exact = rotate_by_hand(rotary.double(), x.double(), coordinates.double())
    # The angle itself is rounded: that is the only error allowed.
    bound = 8 * far * torch.finfo(dtype).eps + 8 * torch.finfo(dtype).eps
    assert_close(rotated.double(), exact, bound)


@pytest.mark.parametrize("far", [1e12, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_large_angles_keep_lengths(
    far: float, dtype: torch.dtype, backend: BackendName
) -> None:
    rotary = encoding(backend=backend).to(dtype)
    with torch.no_grad():
        rotary.freqs[0].clamp_(-0.3, 0.3)
    x = torch.randn(20, 3, 12, dtype=dtype)
    rotated = rotary(x, torch.rand(20, 3, dtype=dtype) * far)
    lengths, expected = (y.unflatten(-1, (-1, 2)).norm(dim=-1) for y in (rotated, x))
    assert_close(lengths, expected, 16 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------- axis scales

SCALES = (0.3, 4.0, 1.5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_axis_scales_multiply_the_coordinates_of_space(
    dim: int, share_heads: bool, pattern: str, backend: BackendName
) -> None:
    options: dict[str, Any] = {"freq_group_pattern": pattern, "share_heads": share_heads}
    rotary = encoding(12, 3, dim, axis_scales=SCALES[:dim], backend=backend, **options)
    plain = encoding(12, 3, dim, backend=backend, **options)
    plain.load_state_dict(rotary.state_dict())
    x, coordinates = inputs(rotary)
    leaves = [x, coordinates]
    scaled = coordinates * torch.tensor([*SCALES[:dim], 1.0], dtype=torch.float64)
    outs = rotary(x, coordinates), plain(x, scaled)
    assert_close(*outs, 1e-12)
    ours, theirs = (
        torch.autograd.grad(out.sin().sum(), [*leaves, *module.parameters()])
        for out, module in zip(outs, (rotary, plain), strict=True)
    )
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right, 1e-10)
    assert_close(outs[0], rotate_by_hand(rotary, x, coordinates), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_axis_scales_are_exact_far_from_the_origin(
    dtype: torch.dtype, backend: BackendName
) -> None:
    rotary = encoding(8, 2, 1, axis_scales=[1 / 3], backend=backend).to(dtype)
    coordinates = torch.tensor([[2.0**30 + 0.5, 0], [2.0**29 + 1.5, 1]], dtype=torch.float64)
    x = torch.randn(2, 2, 8).to(dtype)
    rotated = rotary(x, coordinates)
    assert rotated.dtype == dtype
    assert all(freqs.dtype == dtype for freqs in rotary.freqs)
    exact = rotate_by_hand(rotary.double(), x.double(), coordinates)
    # float64 holds angles of 2^30 radians to 2^-23; the result is rounded to dtype.
    assert_close(rotated.double(), exact, 8 * torch.finfo(dtype).eps + 2.0**-20)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_axis_scales_as_any_sequence(kind: Any) -> None:
    rotary = RotaryEncoding(8, 2, 2, axis_scales=kind([2.0, 0.5]))
    assert rotary.axis_scales == (2.0, 0.5)
    assert list(rotary.state_dict()) == ["freqs.0"]
    assert "axis_scales=(2.0, 0.5)" in repr(rotary)
    assert "axis_scales" not in repr(RotaryEncoding(8, 2, 2))


# ------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("pattern", PATTERNS)
def test_initial_frequencies(pattern: str) -> None:
    rotary = encoding(
        12, 500, 2, freq_group_pattern=pattern, spatial_base_theta=50.0, level_base_theta=7.0
    )
    thetas = {"single": [[50, 50, 7]], "partition": [[50, 50], [7]],
              "closure": [[50, 50], [7], [50, 50, 7]]}[pattern]  # fmt: skip
    for freqs, bases in zip(rotary.freqs, thetas, strict=True):
        n_pairs = freqs.shape[-1]
        for coordinate, theta in enumerate(bases):
            first = freqs[coordinate, :, :1].detach()
            steps = torch.arange(n_pairs, dtype=torch.float64) / n_pairs
            assert_close(freqs[coordinate].detach(), first * theta**-steps, 1e-6)
            # The cosine of a uniform angle: mean 0, variance a half, and a quarter below -0.707.
            assert 0.999 < first.abs().max() <= 1
            assert abs(float(first.mean())) < 4 * math.sqrt(0.5 / 500)
            assert abs(float(first.var()) - 0.5) < 0.08
            assert abs(float((first < -math.sqrt(0.5)).double().mean()) - 0.25) < 0.08


def test_heads_with_shared_or_own_frequencies() -> None:
    assert [tuple(f.shape) for f in encoding(12, 3, 2).freqs] == [(3, 3, 6)]
    assert [tuple(f.shape) for f in encoding(12, 3, 2, share_heads=True).freqs] == [(3, 1, 6)]
    own = encoding(12, 3, 2).freqs[0]
    assert (own[:, 0] != own[:, 1]).all()


def test_default_bases() -> None:
    freqs = encoding(8, 1, 1).freqs[0].detach()
    assert_close(freqs[0, 0] / freqs[0, 0, 0], 100.0 ** -(torch.arange(4.0).double() / 4), 1e-6)
    assert_close(freqs[1, 0] / freqs[1, 0, 0], 10.0 ** -(torch.arange(4.0).double() / 4), 1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reset_parameters_draws_new_values(pattern: str) -> None:
    rotary = encoding(freq_group_pattern=pattern)
    before = [f.detach().clone() for f in rotary.freqs]
    rotary.reset_parameters()
    for old, new in zip(before, rotary.freqs, strict=True):
        assert (old != new).all()
        assert new.dtype == torch.float64
        assert new.requires_grad
    assert list(rotary.state_dict()) == [f"freqs.{group}" for group in range(len(before))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_directions_of_heads(pattern: str, share_heads: bool, dim: int) -> None:
    options = {"freq_group_pattern": pattern, "share_heads": share_heads}
    rotary = encoding(12, 3, dim, spatial_base_theta=50.0, **options)
    before = [freqs.detach().clone() for freqs in rotary.freqs]
    directions = torch.randn(1 if share_heads else 3, dim, dtype=torch.float64)
    rotary.set_directions(directions)
    for group, old, new in zip(rotary.groups, before, rotary.freqs, strict=True):
        for row, coordinate in enumerate(group):
            n_pairs, expected = new.shape[-1], old[row]
            if coordinate < dim:  # the level stays
                decay = 50.0 ** -(torch.arange(n_pairs, dtype=torch.float64) / n_pairs)
                expected = directions[:, coordinate, None] * decay
            assert_close(new[row].detach(), expected, 1e-12)
        assert new.requires_grad


def test_heads_measure_along_their_directions_alone(backend: BackendName) -> None:
    rotary = encoding(12, 3, 2, backend=backend)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]], dtype=torch.float64)
    rotary.set_directions(directions)
    x, here = inputs(rotary, 1)
    for head, (y, z) in enumerate(directions.tolist()):
        steps = torch.tensor([[-z, y, 0.0], [y, z, 0.0]], dtype=torch.float64)
        rotated = [rotary(x, here + step)[:, head] for step in (0 * steps[0], *steps)]
        assert_close(rotated[1], rotated[0], 1e-12)
        assert (rotated[2] - rotated[0]).norm() > 0.1 * x.norm()


@pytest.mark.parametrize(
    "directions",
    [
        torch.eye(2),
        torch.eye(3),
        torch.ones(3),
        torch.ones(3, 2).bool(),
        torch.full((3, 2), 1e300, dtype=torch.float64),
        torch.full((3, 2), math.nan),
    ],
)
def test_directions_that_are_refused(directions: Tensor) -> None:
    rotary = RotaryEncoding(12, 3, 2)
    before = rotary.freqs[0].detach().clone()
    with pytest.raises(ValueError, match=r"^directions: expected"):
        rotary.set_directions(directions)
    assert torch.equal(rotary.freqs[0], before)


def test_directions_on_the_meta_device_and_of_integers() -> None:
    with torch.device("meta"):
        RotaryEncoding(12, 2, 2).set_directions(torch.eye(2))
    rotary, same = RotaryEncoding(12, 2, 2), RotaryEncoding(12, 2, 2)
    same.load_state_dict(rotary.state_dict())
    rotary.set_directions(torch.tensor([[1, 0], [0, -1]]))
    same.set_directions(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    assert torch.equal(rotary.frequencies(), same.frequencies())


def test_numpy_arrays_are_taken() -> None:
    rotary, x, coordinates = RotaryEncoding(8, 2, 2), torch.randn(5, 2, 8), torch.rand(5, 3)
    arrays: Any = x.numpy(), coordinates.numpy()
    assert torch.equal(rotary(*arrays), rotary(x, coordinates))
    rotary.set_directions(np.eye(2))  # type: ignore[arg-type]
    assert rotary.freqs[0][0, :, 0].tolist() == [1, 0]


def test_repr() -> None:
    assert "head_dim=12, n_heads=3, position_dim=2" in repr(encoding())


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "head_dim: expected an even .* got int 7"),
        ({"head_dim": 0}, "head_dim: expected .* got int 0"),
        ({"head_dim": -2}, "head_dim: expected .* got int -2"),
        ({"freq_group_pattern": "triple"}, "freq_group_pattern: expected .* got .*triple"),
        ({"backend": "gpu"}, "backend: expected .* got .*gpu"),
        ({"axis_scales": (1.0,)}, r"axis_scales: expected .* got .*\(1.0,\)"),
        ({"axis_scales": torch.tensor(2.0)}, r"axis_scales: expected .* got .*shape \[\]"),
        ({"axis_scales": (1.0, 0.0)}, "axis_scales: expected .* got .*0.0"),
    ],
)
def test_constructor_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoding(**change)


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("x", torch.rand(20, 3, 10), "[20, 3, 10]"),
        ("x", torch.rand(20, 2, 12), "[20, 2, 12]"),
        ("x", torch.rand(20, 36), "[20, 36]"),
        ("x", torch.ones(20, 3, 12, dtype=torch.int64), "int64"),
        ("coordinates", torch.rand(20, 2), "[20, 2]"),
        ("coordinates", torch.rand(19, 3), "[19, 3]"),
        ("coordinates", torch.ones(20, 3, dtype=torch.int64), "int64"),
        ("coordinates", torch.rand(20, 3, device="meta"), "meta"),
    ],
)
def test_refusals(argument: str, value: Tensor, came: str) -> None:
    arguments = {"x": torch.rand(20, 3, 12), "coordinates": torch.rand(20, 3)} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument}: expected") as refusal:
        encoding().float()(**arguments)
    assert came in str(refusal.value).split("got")[-1]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_made_on_the_meta_device_and_initialized_later(dim: int) -> None:
    with torch.device("meta"):
        rotary = RotaryEncoding(12, 2, dim, freq_group_pattern="closure")
        assert rotary(torch.rand(5, 2, 12), torch.rand(5, dim + 1)).shape == (5, 2, 12)
        rotary = rotary.to_empty(device="cpu")
        rotary.reset_parameters()
    assert all(freqs.isfinite().all() and freqs.any() for freqs in rotary.freqs)
    assert rotary.frequencies().abs().max() <= 1


@pytest.mark.parametrize("base", [10**400, 0, -1.0, math.inf, math.nan, "x", None, True])
def test_bases_that_are_no_finite_numbers_above_0_are_refused(base: Any) -> None:
    for argument in ("spatial_base_theta", "level_base_theta"):
        with pytest.raises(ValueError, match=argument):
            RotaryEncoding(8, 2, 2, **{argument: base})
