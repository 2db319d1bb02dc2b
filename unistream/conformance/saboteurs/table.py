"""Knows the list of saboteurs: name, the rules that each breaks, and its layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
        patch: Entered while it is at work: harm that is done to the library itself, above every driver.
        by: The cases that are made to kill it, tried first.
        needs: What it takes to see its harm, as a case's facilities; where that can't exist it does none.
    """

    name: str
    rules: tuple[str, ...]
    sentence: str
    layer: type[DriverLayer] = DriverLayer
    patch: Callable[[], AbstractContextManager[object]] = nullcontext
    by: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


SABOTEURS: dict[str, Saboteur] = {}


def saboteur(
    name: str,
    *rules: str,
    by: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    driver: type[DriverLayer] = DriverLayer,
) -> Callable[[Layer], Layer]:
    """
    Enter a layer of a driver, producer or consumer into the list; its docstring's first line says what it does.

    A layer of a producer or consumer gets a `driver` layer to stand on.
    """

    def enter(layer: Layer) -> Layer:
        _add(Saboteur(name, rules, _sentence(layer), _driver_layer(layer, driver), by=by, needs=needs))
        return layer

    return enter


Patch = Callable[[], AbstractContextManager[object]]


def mutation(
    name: str, *rules: str, by: tuple[str, ...] = (), layer: type[DriverLayer] = DriverLayer
) -> Callable[[Patch], Patch]:
    """Enter a context manager that harms the library itself while it is entered."""

    def enter(patch: Patch) -> Patch:
        _add(Saboteur(name, rules, _sentence(patch), layer, patch, by=by))
        return patch

    return enter


def _add(saboteur: Saboteur) -> None:
    if saboteur.name in SABOTEURS:
        raise ValueError(f"two saboteurs named {saboteur.name}")
    SABOTEURS[saboteur.name] = saboteur


def _sentence(documented: object) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _driver_layer(layer: Layer, driver: type[DriverLayer]) -> type[DriverLayer]:
    if issubclass(layer, ProducerLayer):
        return type(f"{layer.__name__}Driver", (driver,), {"producer_layer": layer})
    if issubclass(layer, ConsumerLayer):
        return type(f"{layer.__name__}Driver", (driver,), {"consumer_layer": layer})
    return layer
