"""All conversions have the same arguments."""

import inspect

import pytest

from vicinal import interop


@pytest.mark.parametrize("name", [name for name in interop.__all__ if name.startswith("from_")])
def test_pyramids_are_made_by_the_same_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(interop, name)).parameters
    shared: dict[str, object] = {"strides": (1, 2, 4, 8), "pooling": "mean", "periodic_axes": ()}
    if "cell_size" in parameters:
        assert parameters["cell_size"].kind == inspect.Parameter.KEYWORD_ONLY
        shared["bounds"] = None
    for argument, default in shared.items():
        assert parameters[argument].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters[argument].default == default


@pytest.mark.parametrize("name", [name for name in interop.__all__ if name.startswith("to_")])
def test_containers_are_made_of_a_level(name: str) -> None:
    parameters = list(inspect.signature(getattr(interop, name)).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["pyramid", "level"]
    assert parameters[1].default == 0
    assert all(parameter.kind == inspect.Parameter.KEYWORD_ONLY for parameter in parameters[2:])


def test_names_are_sorted() -> None:
    assert list(interop.__all__) == sorted(interop.__all__)
