"""Write what the suite observed into the pages: `python docs/generate.py`.

The README's table of promises and each backend's page have a part between markers that comes from the reports in
`docs/conformance/`, and from nowhere else; a test checks that it is up to date.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = {"memory": "memory", "redis": "redis", "kafka": "kafka", "amqp": "rabbitmq", "nats": "nats"}
TITLES = {"memory": "memory", "redis": "Redis Streams", "kafka": "Kafka", "amqp": "RabbitMQ", "nats": "NATS JetStream"}
PROMISES = {
    "durability": "a confirmed message survives",
    "ordering": "order per key; one unsettled message blocks its",
    "parallelism": "active members of a group",
    "start": "a new group can begin at",
    "seek": "an existing group can be moved",
    "nack_delay": "delayed redelivery",
    "lease": "a lease is tied to",
    "fencing": "a late settle harms nobody",
    "attempts": "attempts are counted",
    "ack_confirm": "a confirmed ack",
    "dedupe": "the same id is stored once",
    "retention": "declared retention",
    "max_backlog": "a bounded backlog",
    "max_message_bytes": "the largest message",
    "lag": "lag",
}


def reports() -> dict[str, list[dict[str, Any]]]:
    """The reports by driver, in the order of the pages."""
    found: dict[str, list[dict[str, Any]]] = {driver: [] for driver in PAGES}
    for path in sorted((DOCS / "conformance").glob("*.json")):
        report = json.loads(path.read_text())
        found[report["driver"]].append(report)
    return {driver: each for driver, each in found.items() if each}


def bounds(name: str, claim: str) -> str:
    """A capability's claim in a few words."""
    level, _, rest = claim.partition(", ")
    if level == "none":
        return "–"
    values = dict(re.findall(r"(\w+) ([^,]+)", rest))
    words = {
        "durability": lambda: {
            "memory": "nothing",
            "process_crash": "kill -9 of the broker",
            "fsync": "power loss",
            "replicated": f"loss of nodes ({values.get('copies')} copies)",
        }[values["kind"]],
        "ordering": lambda: values["blocks"],
        "parallelism": lambda: values["bound"],
        "start": lambda: values["at"].replace("/", ", "),
        "seek": lambda: values["to"].replace("/", ", "),
        "nack_delay": lambda: "any length" if values["max"] == "unbounded" else f"up to {span(values['max'])}",
        "lease": lambda: f"the {values['scope']}, {values['least']} s at least",
        "attempts": lambda: (
            values["count"].replace("_", " ") + ("" if values["off_by"] == "0" else f" ± {values['off_by']}")
        ),
        "ack_confirm": lambda: {"crash": "outlives kill -9", "restart": "outlives a clean restart"}.get(
            values.get("survives", ""), "yes"
        ),
        "dedupe": lambda: f"for {values['window']} s",
        "retention": lambda: values["by"].replace("/", ", "),
        "max_backlog": lambda: values["overflow"].replace("/", ", "),
        "max_message_bytes": lambda: f"{float(values['limit']) / 2**20:.1f} MiB".replace(".0 ", " "),
        "lag": lambda: "exact" if values["exact"] == "True" else "estimated",
    }
    text = words[name]() if name in words else "yes"
    return text if level == "native" else f"{text} *"


def span(seconds: str) -> str:
    """A length of time in the largest unit that fits it."""
    length = float(seconds)
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if length >= unit and length % unit == 0:
            return f"{length / unit:.0f} {name}"
    return f"{length:g} s"


def verdict(report: dict[str, Any]) -> str:
    """How a report came out, in a few words."""
    verdicts = Counter(case["verdict"] for case in report["cases"])
    broken = verdicts["VIOLATION"] + verdicts["UNVERIFIED"] + verdicts["UNSTABLE"] + verdicts["ERROR"]
    passed = f"{verdicts['CONFORMS']} conform, {verdicts['ABSENT']} absent"
    return passed + (f", {broken} not" if broken else "")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The README's table: one column per backend, from its first report."""
    columns = {driver: each[0] for driver, each in found.items()}
    lines = [
        "| | " + " | ".join(f"[{TITLES[driver]}](docs/backends/{PAGES[driver]}.md)" for driver in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        "| observed on | " + " | ".join(report["product"] for report in columns.values()) + " |",
        "| cases of the suite | "
        + " | ".join(f"{report['profile']}: {verdict(report)}" for report in columns.values())
        + " |",
    ]
    for name, promise in PROMISES.items():
        cells = [bounds(name, report["claims"][name]) for report in columns.values()]
        lines.append(f"| {promise} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "`*` kept by the adapter on top of the broker, `–` refused at open."])


def page(each: list[dict[str, Any]]) -> str:
    """A backend page's part: its claims, and what each report saw."""
    lines = [
        "| promise | level | " + " | ".join(report["product"] for report in each) + " |",
        "|---" * (len(each) + 2) + "|",
    ]
    for name, promise in PROMISES.items():
        level = each[0]["claims"][name].partition(",")[0]
        lines.append(
            f"| {promise} | {level} | " + " | ".join(bounds(name, report["claims"][name]) for report in each) + " |"
        )
    for report in each:
        lines += ["", f"{report['product']}, profile {report['profile']}: {verdict(report)}."]
        for case in report["cases"]:
            if case["verdict"] not in ("CONFORMS", "ABSENT", "INAPPLICABLE"):
                lines.append(f"- {case['verdict']} `{case['id']}` ({', '.join(case['rules'])}): {case['promise']}")
    return "\n".join(lines)


def between(text: str, marker: str, content: str) -> str:
    """The text with what stands between two markers replaced."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers <!-- {marker} --> … <!-- /{marker} --> to write between")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def generated() -> dict[Path, str]:
    """Every page that has a generated part, as it should be."""
    found = reports()
    readme = DOCS.parent / "README.md"
    pages = {readme: between(readme.read_text(), "promises", table(found))}
    for driver, each in found.items():
        path = DOCS / "backends" / f"{PAGES[driver]}.md"
        pages[path] = between(path.read_text(), "observed", page(each))
    return pages


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
        print(path.relative_to(DOCS.parent))
