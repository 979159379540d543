"""Adapters of peft on the projections of the block."""

from typing import Any

import pytest
import torch
from frameworks.small_model import WIDTH, make_batch

from vicinal import SparseNeighborhoodAttentionBlock

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
peft = pytest.importorskip("peft")
PROJECTIONS = ["q_in_proj", "kv_proj", "out_proj"]


def encode(block: Any) -> torch.Tensor:
    torch.manual_seed(1)
    pyramid = make_batch(2)
    arguments = pyramid.values, pyramid.positions(), pyramid.batch_offsets(), pyramid
    out: torch.Tensor = block(*arguments)
    return out


@pytest.mark.parametrize("names", [[name] for name in PROJECTIONS] + [PROJECTIONS])
def test_adapters_change_the_output_and_can_be_merged(names: list[str]) -> None:
    block = SparseNeighborhoodAttentionBlock(WIDTH, 2, 2, (3, 5)).eval()
    before = encode(block)
    adapted = peft.get_peft_model(block, peft.LoraConfig(r=2, target_modules=names)).eval()
    torch.testing.assert_close(encode(adapted), before)  # adapters are zero at first
    trained = {name for name, x in adapted.named_parameters() if x.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all(".lora_" in name for name in trained)
    for name in trained:
        torch.nn.init.normal_(adapted.get_parameter(name))
    changed = encode(adapted)
    assert (changed - before).abs().amax() > 0.1
    changed.sum().backward()
    for name, x in adapted.named_parameters():
        assert (x.grad is not None) == (name in trained)
    merged = adapted.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(encode(merged), changed, rtol=1e-4, atol=1e-5)
