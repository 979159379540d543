"""What the scaling study runs."""

from typing import NamedTuple


class RanksSettings(NamedTuple):
    """Sizes of a study: ranks, scenes, layers."""

    device: str  # of the ranks: cpu or cuda
    dtype: str = "float32"
    ranks: tuple[int, ...] = (1, 2, 4)
    tracks: int = 100  # of the scene that is divided, and of each rank's where it grows
    part_tracks: int = 1582  # of the scene that is cut into parts without ranks
    parts: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    lidar_parts: tuple[int, ...] = (16,)
    rounds: int = 5
    layers: int = 2
    embed_dim: int = 256
    n_heads: int = 8


SETTINGS = {
    "full": RanksSettings("cpu"),
    "quick": RanksSettings(
        "cpu", tracks=4, part_tracks=8, parts=(2, 4), lidar_parts=(), rounds=1,
        embed_dim=16, n_heads=2,
    ),
}  # fmt: skip
