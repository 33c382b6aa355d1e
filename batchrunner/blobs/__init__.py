"""Where bytes lie: one module per implementation of the Blobs port, imported only where it is used."""

from __future__ import annotations
