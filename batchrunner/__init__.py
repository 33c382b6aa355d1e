"""Run a file of LLM requests against any OpenAI-compatible server, exactly once each, and prove it."""

from __future__ import annotations

__version__ = "0.1.0"
