"""State dicts in the form of the earlier implementation, so that a training run can go back."""

from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import refuse
from ._earlier_keys import (
    EARLIER_KV_PROJ,
    KV_PROJ,
    PROJ_PARAMETERS,
    ROTARY_BUFFERS,
    THETAS,
)
from .block import SparseNeighborhoodAttentionBlock
from .rotary import RotaryEncoding


def export_state_dict(module: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a module with each block's keys as the earlier implementation's.

    A block's ``kv_proj`` becomes ``subset_attn.kv_proj``, and the constant buffers of that
    implementation (`sparse-transformer-layers`) are added. Everything else is as in
    ``module.state_dict()``, whose tensors it shares. A `SparseNeighborhoodAttentionBlock` loads
    either form with ``strict=True``.

    Args:
        module: a block, or a module that contains blocks at any depth.

    Returns:
        the tensors by name. The two bases of the frequencies have the dtype of the frequencies;
        index tables are bool or int64.

    Raises:
        ValueError: ``module`` is not a module.

    Example:
        ```python
        from vicinal import SparseNeighborhoodAttentionBlock, export_state_dict

        block = SparseNeighborhoodAttentionBlock(embed_dim=32, n_heads=4)
        earlier = export_state_dict(block)
        assert earlier["subset_attn.kv_proj.weight"].shape == (64, 32)
        assert earlier["rope_spatial_base_theta"] == 100
        block.load_state_dict(earlier, strict=True)
        ```
    """
    if not isinstance(module, nn.Module):
        refuse("module", "a torch.nn.Module", module)
    state: dict[str, Any] = module.state_dict()
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, SparseNeighborhoodAttentionBlock):
            converted = _converted(state, f"{name}." if name else "", part)
            state.clear()  # the same dict, which also holds the versions of modules
            state.update(converted)
    return state


def _converted(
    state: dict[str, Any], prefix: str, block: SparseNeighborhoodAttentionBlock
) -> dict[str, Any]:
    """``state`` with the keys and the constants of the block at ``prefix``."""
    names = {prefix + KV_PROJ + name: prefix + EARLIER_KV_PROJ + name for name in PROJ_PARAMETERS}
    rotary = f"{prefix}pos_encoding."
    constants = {
        prefix: _bases(block),
        rotary: _index_tables(block.pos_encoding),
    }
    converted: dict[str, Any] = {}
    for key, value in state.items():
        for owner, tensors in constants.items():
            if key.startswith(owner):  # the constants of a module come before its parameters
                for name, tensor in tensors.items():
                    converted.setdefault(owner + name, tensor)
        converted[names.get(key, key)] = value
    return converted


def _bases(block: SparseNeighborhoodAttentionBlock) -> dict[str, Tensor]:
    like = block.pos_encoding.freqs[0]
    bases = block.rope_spatial_base_theta, block.rope_level_base_theta
    return {
        name: torch.tensor(base, dtype=like.dtype, device=like.device)
        for name, base in zip(THETAS, bases, strict=True)
    }


def _index_tables(rotary: RotaryEncoding) -> dict[str, Tensor]:
    """Which coordinates and pairs each group has, and for every frequency, group by group, its
    coordinate, group, head and pair.
    """
    n_groups, device = len(rotary.groups), rotary.freqs[0].device
    pattern = torch.zeros(n_groups, rotary.position_dim + 1, dtype=torch.bool, device=device)
    ranges: list[tuple[int, int]] = []
    indices = []
    for index, (group, freqs) in enumerate(zip(rotary.groups, rotary.freqs, strict=True)):
        pattern[index, group] = True
        start = ranges[-1][1] if ranges else 0
        ranges.append((start, start + freqs.shape[-1]))
        of_group = (
            torch.tensor(group, device=device),
            torch.tensor([index], device=device),
            torch.arange(freqs.shape[1], device=device),
            torch.arange(*ranges[-1], device=device),
        )
        position, number, head, pair = torch.meshgrid(*of_group, indexing="ij")
        indices.append(torch.stack([part.flatten() for part in (position, number, head, pair)]))
    tables = (pattern, torch.tensor(ranges, device=device), *torch.cat(indices, 1))
    return dict(zip(ROTARY_BUFFERS, tables, strict=True))
