"""The peer packages for tests: skipped where they are not installed, and failed there under CI."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

import peer_packages


def import_learn2learn() -> ModuleType:
    """learn2learn; the calling test is skipped where it is not installed, and fails there under CI."""
    _require("learn2learn")
    return peer_packages.import_learn2learn()


def import_torchmeta() -> ModuleType:
    """torchmeta; the calling test is skipped where it is not installed, and fails there under CI."""
    _require("torchmeta")
    return peer_packages.import_torchmeta()


def import_higher() -> ModuleType:
    """higher; the calling test is skipped where it is not installed, and fails there under CI."""
    _require("higher")
    return peer_packages.import_higher()


def _require(name: str) -> None:
    try:
        peer_packages.require(name)
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error), allow_module_level=True)
