"""Calls of the examples' commands, in this process."""

import sys
from types import ModuleType

import pytest


def call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *options: object) -> int:
    """The exit status of ``python -m`` the module, with these options."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
    status: int = module.main()
    return status


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: ModuleType,
    *options: object,
) -> str:
    """What is printed to stderr by a command line that ends with a usage error."""
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, module, *options)
    assert exit_.value.code == 2
    return capsys.readouterr().err
