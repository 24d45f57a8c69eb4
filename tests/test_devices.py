"""Devices: a second one that is really the CPU."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_what_holds_on_the_cpu_holds_on_another_device():
    """In a process of its own: torch keeps a device for good."""
    command = [sys.executable, "-m", "pytest", "tests/on_second_device.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
