"""The option that names a type of event; no heavy import, so that --help stays quick."""

from __future__ import annotations

import click

from batchrunner.deliveries import EventType

EVENT_TYPE = click.Choice([each.value for each in EventType])
