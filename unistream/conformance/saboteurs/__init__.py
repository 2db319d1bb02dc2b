"""Drivers that break one promise each, to prove that the suite notices.

A saboteur is a layer over a good driver. The suite must report a violation with every one of them, and the message must
name the rule that was broken.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from unistream.conformance.saboteurs.table import SABOTEURS, Saboteur, saboteur

__all__ = ["SABOTEURS", "Saboteur", "load_saboteurs", "saboteur"]


def load_saboteurs() -> dict[str, Saboteur]:
    """Import every module of saboteurs and return them by name."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return SABOTEURS
