"""Feed-forward parts, detection heads and self-attention, against formulas and loops."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    HEADS,
    make_queries,
    offsets_from_counts,
    refused,
    spans,
    stir,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close, rotate_by_hand
from torch import Tensor

from vicinal.detr import DetectionHead, FeedForward, ObjectQueries, QuerySelfAttention


def start(position_dim: int = 2) -> tuple[DetectionHead, Tensor, Tensor]:
    queries = make_queries([40], position_dim)
    head = DetectionHead(EMBED, CLASSES, position_dim).double()
    return head, queries.embeddings.detach(), queries.boxes.detach()


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_a_new_head_keeps_boxes_and_has_low_scores(
    position_dim: int,
) -> None:
    head, embeddings, boxes = start(position_dim)
    logits, refined = head(embeddings, boxes)
    assert torch.equal(refined, boxes)
    assert logits.shape == (40, CLASSES)
    assert 0.005 < float(logits.detach().sigmoid().median()) < 0.02
    assert_close(head(0 * embeddings, boxes)[0].sigmoid(), torch.full_like(logits, 0.01), 1e-6)


def test_reset_parameters_reinitializes_a_head() -> None:
    head, embeddings, boxes = start()
    head.reset_parameters()
    before = {name: x.clone() for name, x in head.state_dict().items()}
    stir(head)
    head.reset_parameters()
    assert torch.equal(head(embeddings, boxes)[1], boxes)
    assert_close(head.classes.bias, torch.full_like(head.classes.bias, -math.log(99)), 1e-6)
    constant = {"classes.bias", "box.4.weight", "box.4.bias"}
    for name, x in head.state_dict().items():
        assert torch.equal(x, before[name]) == (name in constant), name


def test_a_head_moves_boxes_relative_to_their_size() -> None:
    head, embeddings, boxes = start(3)
    stir(head)
    logits, refined = head(embeddings, boxes)
    deltas = head.box(embeddings)
    assert_close(logits, embeddings @ head.classes.weight.T + head.classes.bias, 1e-12)
    for axis in range(3):
        center, size = boxes[:, axis], boxes[:, 3 + axis]
        assert_close(refined[:, axis], center + deltas[:, axis] * size, 1e-12)
        assert_close(refined[:, 3 + axis], size * deltas[:, 3 + axis].exp(), 1e-12)


def test_a_head_of_far_boxes_keeps_their_dtype_under_autocast() -> None:
    head, embeddings, boxes = start()
    head, boxes = head.float(), boxes.float() + torch.tensor([1000.25, 0, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        _, refined = head(embeddings.float(), boxes)
    assert refined.dtype == torch.float32
    assert torch.equal(refined, boxes)


def test_a_head_of_no_embeddings() -> None:
    head, embeddings, boxes = start()
    logits, refined = head(embeddings[:0], boxes[:0])
    assert logits.shape == (0, CLASSES)
    assert refined.shape == (0, 4)


@pytest.mark.parametrize("argument", ["embed_dim", "n_classes", "position_dim"])
@pytest.mark.parametrize("wrong", [0, 1.5])
def test_invalid_sizes_of_a_head_are_refused(argument: str, wrong: Any) -> None:
    sizes: dict[str, Any] = {"embed_dim": EMBED, "n_classes": CLASSES, "position_dim": 2}
    with refused(argument):
        DetectionHead(**sizes | {argument: wrong})


def test_embeddings_and_boxes_that_do_not_fit_a_head_are_refused() -> None:
    head, embeddings, boxes = start()
    with refused("embeddings"):
        head(embeddings[:, 1:], boxes)
    with refused("boxes"):
        head(embeddings, boxes[1:])
    with refused("boxes"):
        head(embeddings, boxes[:, 1:])
    with refused("boxes"):
        head(embeddings, boxes.long())


@pytest.mark.parametrize("norm_first", [True, False])
def test_feed_forward_matches_its_formula(norm_first: bool) -> None:
    part = FeedForward(EMBED, 12, norm_first=norm_first).double()
    stir(part)
    x = torch.randn(5, EMBED, dtype=torch.float64)
    first, second = part.layers[0], part.layers[3]
    hidden = first(part.norm(x) if norm_first else x)
    out = x + second(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    assert_close(part(x), out if norm_first else part.norm(out), 1e-12)


def test_feed_forward_default_width_and_dropout() -> None:
    part, x = FeedForward(EMBED, dropout=0.5), torch.randn(5, EMBED)
    assert part.layers[0].out_features == 4 * EMBED
    assert not torch.equal(part(x), part(x))
    part.eval()
    assert torch.equal(part(x), part(x))


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("embed_dim", {"embed_dim": 0}),
        ("hidden_dim", {"hidden_dim": 0}),
        ("hidden_dim", {"hidden_dim": 2.5}),
        ("dropout", {"dropout": -0.1}),
    ],
)
def test_invalid_options_of_feed_forward_are_refused(
    argument: str, options: dict[str, Any]
) -> None:
    with refused(argument):
        FeedForward(**{"embed_dim": EMBED} | options)


def test_feed_forward_refuses_another_width() -> None:
    with refused("x"):
        FeedForward(EMBED)(torch.zeros(2, EMBED + 1))


EXACT = 1e-12


def make_attention(position_dim: int = 2, **options: Any) -> QuerySelfAttention:
    attention = QuerySelfAttention(EMBED, HEADS, position_dim, **options).double()
    stir(attention)
    return attention


def by_hand(attention: QuerySelfAttention, queries: ObjectQueries) -> Tensor:
    """Loops over queries; rotary encodings rotate pairs of channels as complex numbers."""
    x = attention.norm(queries.embeddings) if attention.norm_first else queries.embeddings
    parts = attention.in_proj(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in parts)
    where = torch.cat((queries.positions, queries.levels[:, None].double()), 1)
    q, k = (rotate_by_hand(attention.pos_encoding, part, where) for part in (q, k))
    rows = []
    for image in spans(queries.offsets):
        for row in range(image.start, image.stop):
            allowed = list(range(image.start, image.stop))
            if queries.groups is not None:
                allowed = [i for i in allowed if queries.groups[i] == queries.groups[row]]
            weights = ((k[allowed] * q[row]).sum(-1) / math.sqrt(EMBED / HEADS)).softmax(0)
            attended = (weights[..., None] * v[allowed]).sum(0).flatten()
            rows.append(queries.embeddings[row] + attention.out_proj(attended))
    out = torch.stack(rows) if rows else queries.embeddings
    return out if attention.norm_first else attention.norm(out)


def differentiated(out: Tensor, queries: ObjectQueries, *more: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return torch.autograd.grad(out, (queries.embeddings, queries.boxes, *more), cotangent)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_self_attention_matches_loops_over_images(
    position_dim: int, bias: bool, norm_first: bool
) -> None:
    attention = make_attention(position_dim, bias=bias, norm_first=norm_first)
    queries = make_queries([4, 0, 1, 17], position_dim)
    parameters = list(attention.parameters())
    out, expected = attention(queries), by_hand(attention, queries)
    assert_close(out, expected, EXACT)
    for ours, theirs in zip(
        differentiated(out, queries, *parameters),
        differentiated(expected, queries, *parameters),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-10)


@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.integers(0, 100),
    st.booleans(),
)
def test_self_attention_of_any_images_and_groups(
    counts: list[int], seed: int, grouped: bool
) -> None:
    attention, queries = make_attention(), make_queries(counts, seed=seed)
    if grouped:
        generator = torch.Generator().manual_seed(seed)
        groups = torch.randint(-2, 2, (sum(counts),), generator=generator)
        queries = queries._replace(groups=groups)
    assert_close(attention(queries), by_hand(attention, queries), EXACT)


def test_boxes_get_gradients_through_their_centers_only() -> None:
    queries = make_queries([3, 5])
    embeddings, boxes = differentiated(make_attention()(queries), queries)
    assert embeddings.abs().amin() > 0
    assert (boxes[:, :2] != 0).all()
    assert (boxes[:, 2:] == 0).all()


def test_gradients_match_finite_differences() -> None:
    attention, queries = make_attention(), make_queries([1, 3])

    def attend(embeddings: Tensor, boxes: Tensor) -> Tensor:
        out: Tensor = attention(queries._replace(embeddings=embeddings, boxes=boxes))
        return out

    assert torch.autograd.gradcheck(attend, (queries.embeddings, queries.boxes))


def jacobian_blocks(queries: ObjectQueries) -> Tensor:
    """Bool ``[N, N]``: whether an output depends on an embedding."""
    attention = make_attention()

    def attend(embeddings: Tensor) -> Tensor:
        out: Tensor = attention(queries._replace(embeddings=embeddings)).sum(1)
        return out

    jacobian = torch.autograd.functional.jacobian(attend, queries.embeddings.detach())
    assert isinstance(jacobian, Tensor)
    return (jacobian != 0).any(-1)


def test_queries_attend_to_their_image_and_group_only() -> None:
    groups = torch.tensor([0, 1, 0, 1, 0, 5, 5])
    queries = make_queries([4, 3])
    image = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    same_image = image[:, None] == image
    assert torch.equal(jacobian_blocks(queries), same_image)
    same_group = groups[:, None] == groups
    blocks = jacobian_blocks(queries._replace(groups=groups))
    assert torch.equal(blocks, same_image & same_group)


def reordered(queries: ObjectQueries, order: Sequence[int]) -> tuple[ObjectQueries, Tensor]:
    """The images in another order, and the rows that the queries come from."""
    images = spans(queries.offsets)
    rows = torch.cat([torch.arange(images[i].start, images[i].stop) for i in order])
    counts = [images[i].stop - images[i].start for i in order]
    embeddings, boxes, levels = queries.embeddings[rows], queries.boxes[rows], queries.levels[rows]
    return ObjectQueries(embeddings, boxes, levels, offsets_from_counts(counts)), rows


def test_the_order_of_images_does_not_matter() -> None:
    attention, queries = make_attention(), make_queries([3, 0, 6, 1])
    other, rows = reordered(queries, [2, 3, 1, 0])
    assert_close(attention(other), attention(queries)[rows], EXACT)


def test_other_images_do_not_matter() -> None:
    attention, queries = make_attention(), make_queries([3, 9])
    alone, rows = reordered(queries, [0])
    assert_close(attention(alone), attention(queries)[rows], EXACT)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_in_their_image(bad: float) -> None:
    attention, queries = make_attention(), make_queries([3, 4, 2])
    clean = attention(queries)
    spoilt = queries.embeddings.detach().clone()
    spoilt[4] = bad
    out = attention(queries._replace(embeddings=spoilt))
    assert out[3:7].isnan().all()
    others = [0, 1, 2, 7, 8]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_queries_at_all(counts: list[int]) -> None:
    attention, queries = make_attention(), make_queries(counts)
    out = attention(queries)
    assert out.shape == (0, EMBED)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())


def test_one_query_attends_to_itself() -> None:
    attention, queries = make_attention(), make_queries([1])
    _, _, v = attention.in_proj(attention.norm(queries.embeddings)).chunk(3, -1)
    assert_close(attention(queries), queries.embeddings + attention.out_proj(v), EXACT)


def test_dropout_is_active_in_training_only() -> None:
    attention, queries = make_attention(dropout=0.5), make_queries([3, 0, 4])
    exact = by_hand(attention, queries)
    assert (attention(queries) - exact).abs().amax() > 0.01
    torch.manual_seed(3)
    first = attention(queries)
    torch.manual_seed(3)
    assert torch.equal(attention(queries), first)
    assert_close(attention.eval()(queries), exact, EXACT)


def test_autocast_keeps_the_residual_and_distant_positions_precise() -> None:
    attention = make_attention().float()
    queries = make_queries([5, 2], dtype=torch.float32)
    boxes = queries.boxes.detach() + torch.tensor([300.0, 300, 0, 0])
    queries = queries._replace(boxes=boxes)
    exact = attention(queries)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(queries)
    assert out.dtype == torch.float32
    assert_close(out, exact, 0.1)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("embed_dim", {"embed_dim": 9}),
        ("embed_dim", {"embed_dim": 6}),  # heads of width 3
        ("embed_dim", {"embed_dim": 0}),
        ("n_heads", {"n_heads": 0}),
        ("n_heads", {"n_heads": 2.0}),
        ("position_dim", {"position_dim": 0}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_invalid_options_are_refused_by_name(argument: str, options: dict[str, Any]) -> None:
    with refused(argument):
        QuerySelfAttention(**{"embed_dim": EMBED, "n_heads": HEADS} | options)


def test_queries_of_another_width_or_dimension_are_refused() -> None:
    with refused("queries.embeddings"):
        make_attention()(make_queries([2], embed_dim=EMBED + 2))
    with refused("queries.boxes"):
        make_attention(3)(make_queries([2], 2))
