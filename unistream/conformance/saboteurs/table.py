"""Knows the list of saboteurs: name, the rules that each breaks, and its layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer

Layer = type[DriverLayer] | type[ProducerLayer] | type[ConsumerLayer]


@dataclass(frozen=True, slots=True)
class Saboteur:
    """
    A layer that breaks one promise.

    Attributes:
        name: Stable name, such as `drop-on-nack`.
        rules: The rules that it breaks; a report that kills it names one of them.
        sentence: What it does.
        layer: Put over a good driver.
    """

    name: str
    rules: tuple[str, ...]
    sentence: str
    layer: type[DriverLayer]


SABOTEURS: dict[str, Saboteur] = {}


def saboteur(name: str, *rules: str) -> Callable[[Layer], Layer]:
    """Enter a layer of a driver, producer or consumer into the list; its docstring's first line says what it does."""

    def enter(layer: Layer) -> Layer:
        if name in SABOTEURS:
            raise ValueError(f"two saboteurs named {name}")
        sentence = (layer.__doc__ or "").strip().partition("\n")[0]
        SABOTEURS[name] = Saboteur(name, rules, sentence, _driver_layer(layer))
        return layer

    return enter


def _driver_layer(layer: Layer) -> type[DriverLayer]:
    if issubclass(layer, ProducerLayer):
        return type(f"{layer.__name__}Driver", (DriverLayer,), {"producer_layer": layer})
    if issubclass(layer, ConsumerLayer):
        return type(f"{layer.__name__}Driver", (DriverLayer,), {"consumer_layer": layer})
    return layer
