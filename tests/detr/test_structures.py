"""Ragged batches: offsets, the best rows of each image, matches, and checks."""

import itertools
from typing import Any

import pytest
import torch
from detr_scenes import (
    EMBED,
    make_queries,
    offsets_from_counts,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st

from vicinal._utils.ragged import batch_ids
from vicinal.detr import Matches
from vicinal.detr.structures import check_object_queries, top_k_per_image

COUNTS = st.lists(st.integers(0, 5), max_size=5)


@given(COUNTS, st.integers(1, 6), st.integers(0, 100))
def test_top_k_per_image_matches_sorting_each_image(
    counts: list[int], n_best: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_from_counts(counts)
    scores = torch.randint(4, (sum(counts),), generator=generator).float()  # with many ties
    chosen, chosen_offsets = top_k_per_image(
        scores, batch_ids(offsets, len(scores)), len(counts), n_best
    )
    expected = [
        sorted(range(first, last), key=lambda row: (-float(scores[row]), row))[:n_best]
        for first, last in itertools.pairwise(offsets.tolist())
    ]
    assert chosen.tolist() == [row for rows in expected for row in rows]
    assert chosen_offsets.tolist() == offsets_from_counts(list(map(len, expected))).tolist()


def test_positions_are_the_centers_of_the_boxes() -> None:
    queries = make_queries([2, 1], 3)
    assert torch.equal(queries.positions, queries.boxes[:, :3])


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("queries.embeddings", torch.zeros(3, EMBED + 1)),
        ("queries.embeddings", torch.zeros(3, EMBED, dtype=torch.int64)),
        ("queries.embeddings", None),
        ("queries.boxes", torch.ones(3, 3)),
        ("queries.boxes", torch.ones(2, 4)),
        ("queries.boxes", torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, torch.nan, 1, 1]])),
        ("queries.boxes", torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])),
        ("queries.levels", torch.zeros(3)),
        ("queries.levels", torch.zeros(2, dtype=torch.int64)),
        ("queries.offsets", torch.tensor([0, 2, 4])),
        ("queries.offsets", torch.tensor([0, 2, 1, 3])),
        ("queries.offsets", torch.tensor([0.0, 3.0])),
        ("queries.offsets", torch.tensor([], dtype=torch.int64)),
        ("queries.groups", torch.zeros(3)),
        ("queries.groups", torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_invalid_queries_are_refused_by_name(argument: str, wrong: Any) -> None:
    queries = make_queries([2, 1])
    check_object_queries(queries, EMBED, 2)
    changed = queries._replace(**{argument.removeprefix("queries."): wrong})
    with refused(argument):
        check_object_queries(changed, EMBED, 2)


def test_other_types_are_refused() -> None:
    with refused("queries"):
        check_object_queries(tuple(make_queries([1])), EMBED, 2)


def test_matches_from_an_assignment() -> None:
    matches = Matches.from_assignment(torch.tensor([-1, 3, 0, -1, 3]))
    assert matches.prediction.tolist() == [1, 2, 4]
    assert matches.target.tolist() == [3, 0, 3]
    assert not any(map(len, Matches.from_assignment(torch.tensor([-1, -1]))))
