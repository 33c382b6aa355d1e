"""An OpenAI-compatible upstream that calls no model: a server of its own, blind to the rest of the package."""

from __future__ import annotations

from batchrunner.simulate.replies import expected_reply
from batchrunner.simulate.rules import SimulatorSettings
from batchrunner.simulate.simulator import Simulator, serve_until_signalled
from batchrunner.simulate.tally import SimulatorStats

__all__ = ["Simulator", "SimulatorSettings", "SimulatorStats", "expected_reply", "serve_until_signalled"]
