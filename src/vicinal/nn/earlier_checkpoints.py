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
        ValueError: ``module`` is not a module, or it contains a block that the earlier
            implementation does not have: one with a ``point_dim`` other than ``embed_dim``, with
            ``rotary=False``, with ``rope_axis_scales`` other than one, with a ``relative_bias`` or
            ``rotary_values``, or with windows that are not boxes of one odd size.

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
    blocks = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, SparseNeighborhoodAttentionBlock)
    }
    for name, block in blocks.items():
        _check_options(name, block)
    state: dict[str, Any] = module.state_dict()
    for name, block in blocks.items():
        converted = _converted(state, f"{name}." if name else "", block)
        state.clear()  # the same dict, which also holds the versions of modules
        state.update(converted)
    return state


def _check_options(name: str, block: SparseNeighborhoodAttentionBlock) -> None:
    """Raises ValueError unless the earlier implementation computes the same with the parameters of
    the block ``name``.
    """
    new = {
        f"point_dim={block.point_dim}": block.point_dim != block.embed_dim,
        "rotary=False": block.pos_encoding is None,
        "relative_bias=True": block.relative_bias is not None,
        "rotary_values=True": block.rotary_values,
        f"neighborhood_sizes={list(block.neighborhood_sizes)}": not all(
            isinstance(size, int) and size for size in block.neighborhood_sizes
        ),
        f"rope_axis_scales={block.rope_axis_scales}": set(block.rope_axis_scales or ()) - {1.0},
    }
    found = [option for option, differs in new.items() if differs]
    if found:
        expected = "blocks without options that the earlier implementation does not have"
        block_name = repr(name) if name else "a block"
        refuse("module", expected, f"{block_name} with {', '.join(found)}")


def _converted(
    state: dict[str, Any], prefix: str, block: SparseNeighborhoodAttentionBlock
) -> dict[str, Any]:
    """``state`` with the keys and the constants of the block at ``prefix``."""
    names = {prefix + KV_PROJ + name: prefix + EARLIER_KV_PROJ + name for name in PROJ_PARAMETERS}
    constants = {
        prefix: _bases(block),
        f"{prefix}pos_encoding.": _index_tables(block.pos_encoding),
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
