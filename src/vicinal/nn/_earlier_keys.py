"""The keys of the earlier implementation's checkpoints, and hooks that load them."""

from typing import Any

from torch import nn

KV_PROJ, EARLIER_KV_PROJ = "kv_proj.", "subset_attn.kv_proj."
PROJ_PARAMETERS = ("weight", "bias")
THETAS = ("rope_spatial_base_theta", "rope_level_base_theta")
ROTARY_BUFFERS = (
    "freq_group_pattern",
    "encoding_ranges",
    "freq_pos_indices",
    "freq_group_indices",
    "freq_head_indices",
    "freq_enc_indices",
)


def rename_earlier_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Hook of the block: the earlier implementation names a projection differently and saves two
    constants.
    """
    for name in PROJ_PARAMETERS:
        earlier = prefix + EARLIER_KV_PROJ + name
        if earlier in state_dict:
            state_dict[prefix + KV_PROJ + name] = state_dict.pop(earlier)
    for name in THETAS:
        state_dict.pop(prefix + name, None)


def drop_rotary_buffers(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Hook of the rotary encoding: the earlier implementation saves index tables as well."""
    for name in ROTARY_BUFFERS:
        state_dict.pop(prefix + name, None)
