"""The finished rebuild that the tests of the audit forge."""

import shutil

import pytest

import rebuild_factory


@pytest.fixture(scope="session")
def untampered_rebuild(tmp_path_factory):
    return rebuild_factory.write(tmp_path_factory.mktemp("honest") / "recipe")


@pytest.fixture
def copy(untampered_rebuild, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "recipe"  # as deep as the honest one: its root is a relative path
    shutil.copytree(untampered_rebuild, folder, symlinks=True)
    return folder
