"""N-D rotary position encoding with learned frequencies."""

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import (
    as_list,
    as_numbers,
    check_base,
    check_counts,
    check_finite,
    check_tensor,
    has_contents,
    is_real,
    refuse,
)
from .._utils.constants import widest_dtype
from .._utils.modules import Module
from .._utils.types import BackendName, FreqGroupsLike
from ..backends import check_backend, choose_backend
from ..windows import coordinate_dtype
from ._earlier_keys import drop_rotary_buffers


class FreqGroupPattern(str, Enum):
    """Which coordinates the frequency groups of a `RotaryEncoding` have.

    Each member equals its word, so that an argument may be either.

    Example:
        ```python
        from vicinal import FreqGroupPattern, RotaryEncoding

        rotary = RotaryEncoding(8, 2, 2, freq_group_pattern=FreqGroupPattern.PARTITION)
        assert rotary.freq_group_pattern == "partition"
        assert rotary.groups == [[0, 1], [2]]
        ```
    """

    SINGLE = "single"
    """One group with all coordinates."""
    PARTITION = "partition"
    """A group of the spatial coordinates and one of the level."""
    CLOSURE = "closure"
    """A group of the spatial coordinates, one of the level, and one of all coordinates."""


class RotaryEncoding(Module):
    """Rotates each head's channel pairs by angles that are linear in the position.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), in N
    dimensions with learned frequencies. A position has P spatial coordinates, then its level.

    Args:
        head_dim: channels per head, d. Even: the pairs are (0, 1), (2, 3), ...
        n_heads: number of heads, H.
        position_dim: number of spatial dimensions, P.
        spatial_base_theta: base of the initial frequencies of spatial coordinates. Default: 100.
        level_base_theta: base of the initial frequencies of the level. Default: 10.
        share_heads: whether all heads share one set of frequencies. Default: False.
        freq_group_pattern: the coordinates of each group of pairs. ``"single"`` (default): one
            group with all coordinates. ``"partition"``: space; level. ``"closure"``: space; level;
            all. A word, a `FreqGroupPattern`, or a member of any enum whose value is the word.
        enforce_freq_groups_equal: whether groups of unequal size raise a ValueError (default).
            Otherwise the first groups get one more pair each.
        axis_scales: ``[P]`` finite numbers above 0, a sequence, a tensor or an array: spatial
            coordinates are multiplied with them before the frequencies. None (default): with one.
            They are not in the state dict.
        backend: back end of the rotation, see `neighborhood_attention`.
        device: of the parameters. None (default): torch's default device.
        dtype: of the parameters. None (default): torch's default dtype.

    ``freqs[g]`` is the parameter of group g, ``[coordinates of g, H or 1, pairs of g]``.

    Raises:
        ValueError: ``head_dim`` is odd, the pattern is unknown, groups have unequal sizes, or
            ``axis_scales`` are not P finite numbers above 0.

    Example:
        ```python
        import torch
        from vicinal import RotaryEncoding

        rotary = RotaryEncoding(head_dim=8, n_heads=2, position_dim=2)
        x = torch.randn(5, 2, 8)
        coordinates = torch.tensor([[3.5, 7.5, 0.0]]).expand(5, -1)  # row, column, level
        rotated = rotary(x, coordinates)
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
        ```
    """

    def __init__(
        self,
        head_dim: int,
        n_heads: int,
        position_dim: int,
        *,
        spatial_base_theta: float = 100.0,
        level_base_theta: float = 10.0,
        share_heads: bool = False,
        freq_group_pattern: FreqGroupsLike = "single",
        enforce_freq_groups_equal: bool = True,
        axis_scales: Tensor | Sequence[float] | None = None,
        backend: BackendName | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(head_dim=head_dim, n_heads=n_heads, position_dim=position_dim)
        head_dim, n_heads, position_dim = int(head_dim), int(n_heads), int(position_dim)
        if head_dim % 2:
            refuse("head_dim", "an even number of channels per head", head_dim)
        pattern = as_freq_group_pattern("freq_group_pattern", freq_group_pattern)
        check_backend(backend)
        self.head_dim, self.n_heads, self.position_dim = head_dim, n_heads, position_dim
        self.backend, self.freq_group_pattern, self.share_heads = backend, pattern, share_heads
        space_base = check_base("spatial_base_theta", spatial_base_theta)
        self.thetas = [space_base] * position_dim
        self.thetas.append(check_base("level_base_theta", level_base_theta))
        self.axis_scales = as_axis_scales("axis_scales", axis_scales, position_dim)
        space, level = list(range(position_dim)), [position_dim]
        self.groups = {
            "single": [space + level],
            "partition": [space, level],
            "closure": [space, level, space + level],
        }[pattern.value]

        if enforce_freq_groups_equal:
            check_equal_groups("head_dim", head_dim, pattern)
        share, rest = divmod(head_dim // 2, len(self.groups))
        heads = 1 if share_heads else n_heads
        self.freqs = nn.ParameterList(
            torch.empty(len(group), heads, share + (index < rest), device=device, dtype=dtype)
            for index, group in enumerate(self.groups)
        )
        self.register_load_state_dict_pre_hook(drop_rotary_buffers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all frequencies from their initial distribution."""
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            angle = torch.rand(*freqs.shape[:2], 1, dtype=freqs.dtype, device=freqs.device)
            freqs.copy_((2 * math.pi * angle).cos() * self._magnitudes(group, freqs))

    @torch.no_grad()
    def set_directions(self, directions: Tensor) -> None:
        """Sets the spatial frequencies so that each head measures along one direction.

        Pair i of n gets the frequencies ``directions[h] * spatial_base_theta ** (-i / n)``, those
        of the level stay. Such a head tells how far points lie in its direction, and nothing of
        how far they lie across. Initially the directions are random, with other lengths.

        Args:
            directions: numbers ``[H, P]``, or ``[1, P]`` with ``share_heads``, usually of length 1;
                of coordinates that ``axis_scales`` have multiplied.

        Raises:
            ValueError: ``directions`` has another shape or device, or is not finite in the dtype of
                the frequencies.

        Example:
            ```python
            import torch
            from vicinal import RotaryEncoding

            rotary = RotaryEncoding(head_dim=4, n_heads=2, position_dim=2)
            rotary.set_directions(torch.eye(2))  # head 0 measures along rows, head 1 along columns
            assert rotary.frequencies()[1, 0].tolist() == [0, 0]
            ```
        """
        first = self.freqs[0]
        shape = (first.shape[1], self.position_dim)
        given = check_tensor("directions", directions, shape, kind="number", device=first.device)
        directions = given.to(first.dtype)
        if has_contents(directions):
            check_finite("directions", directions)
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            axes = [c for c in group if c < self.position_dim]
            lengths = self._magnitudes(group, freqs)[: len(axes)]
            freqs[: len(axes)] = directions.t()[axes, :, None] * lengths

    def _magnitudes(self, group: list[int], freqs: Tensor) -> Tensor:
        """The largest initial frequencies of a group, ``[coordinates, 1, pairs]``."""
        n_pairs = freqs.shape[-1]
        steps = torch.arange(n_pairs, dtype=freqs.dtype, device=freqs.device) / max(n_pairs, 1)
        thetas = [self.thetas[c] for c in group]
        theta = torch.tensor(thetas, dtype=freqs.dtype, device=freqs.device)
        return theta[:, None, None] ** -steps

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Rotates ``x`` ``[n, H, d]`` by the angles of ``coordinates`` ``[n, P + 1]``.

        The coordinates are those before ``axis_scales``. Angles are computed in float64, so they
        are as exact at coordinates of 2^30 as near the origin; the rotation in float32, or float64
        if ``x`` has that dtype. The result has the shape and dtype of ``x``. Back ends other than
        the reference sum the gradients of the frequencies in the dtype of the rotation: at large
        coordinates float32 holds them to 2^-24 of the largest product with a coordinate.

        Raises:
            ValueError: shapes or devices do not match, or coordinates are integers.
        """
        x = check_tensor("x", x, ("n", self.n_heads, self.head_dim), kind="floating")
        shape = (x.shape[0], self.position_dim + 1)
        coordinates = check_tensor(
            "coordinates", coordinates, shape, kind="floating", device=x.device
        )
        coordinates = coordinates.to(coordinate_dtype(coordinates.dtype))
        backend = choose_backend(self.backend, x.device, x.dtype)
        return backend.rotate(x, coordinates, self._scaled_frequencies())

    def frequencies(self) -> Tensor:
        """Returns all frequencies ``[P + 1, H or 1, d / 2]``, zero outside a pair's group.

        They are for coordinates that ``axis_scales`` have multiplied already. With one group they
        are the parameter itself.
        """
        if len(self.groups) == 1:
            only: Tensor = self.freqs[0]
            return only
        blocks = []
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            above, below = group[0], self.position_dim - group[-1]
            blocks.append(nn.functional.pad(freqs, (0, 0, 0, 0, above, below)))
        return torch.cat(blocks, -1)

    def _scaled_frequencies(self) -> Tensor:
        """The frequencies of coordinates before ``axis_scales``.

        So the coordinates, which layers share, stay as they are. A float32 product would be off by
        radians at coordinates of 2^30.
        """
        frequencies = self.frequencies()
        if self.axis_scales is None:
            return frequencies
        rows = frequencies.to(widest_dtype(frequencies.device)).unbind()
        scales = (*self.axis_scales, 1.0)  # the level is not scaled
        return torch.stack([row * scale for row, scale in zip(rows, scales, strict=True)])

    def extra_repr(self) -> str:
        sizes = {name: getattr(self, name) for name in ("head_dim", "n_heads", "position_dim")}
        if self.axis_scales is not None:
            sizes["axis_scales"] = self.axis_scales
        return ", ".join(f"{name}={size}" for name, size in sizes.items())


def as_freq_group_pattern(argument: str, pattern: FreqGroupsLike) -> FreqGroupPattern:
    """The pattern that a word or a member of any enum names; raises ValueError for others."""
    word = pattern.value if isinstance(pattern, Enum) else pattern
    words = [known.value for known in FreqGroupPattern]
    if not isinstance(word, str) or word not in words:
        refuse(argument, f"one of {words}, or an enum with such a value", pattern)
    return FreqGroupPattern(word)


def as_axis_scales(argument: str, scales: Any, position_dim: int) -> tuple[float, ...] | None:
    """``scales`` as ``position_dim`` floats; raises ValueError unless they are finite and above 0.

    At 0 the encoding would not depend on that axis, and a sign would change nothing but the sign of
    frequencies that are drawn symmetrically: both hint at a mistake.
    """
    if scales is None:
        return None
    expected = f"a finite number above 0 for each of {position_dim} axes"
    if is_real(as_list(argument, scales, expected)):
        refuse(argument, expected, scales)
    numbers = as_numbers(argument, scales, position_dim, expected)
    if min(numbers) <= 0:
        refuse(argument, expected, scales)
    return tuple(map(float, numbers))


def check_equal_groups(argument: str, head_dim: int, pattern: FreqGroupPattern) -> None:
    """Raises ValueError unless the channels of a head divide into equal groups of pairs."""
    n_groups = {"single": 1, "partition": 2, "closure": 3}[pattern.value]
    if head_dim % (2 * n_groups):
        expected = f"a head width that is a multiple of {2 * n_groups} for equal frequency groups"
        refuse(argument, f"{expected} ({pattern.value!r})", head_dim)
