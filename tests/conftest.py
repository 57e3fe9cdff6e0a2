"""Numerics are fixed before any test imports torch, and every test runs from the project's root."""

from pathlib import Path

import pytest

from kohaku_delta import numerics

ROOT = Path(__file__).resolve().parents[1]
numerics.prepare()


@pytest.fixture(autouse=True)
def chdir_to_repo_root(monkeypatch):
    monkeypatch.chdir(ROOT)
