"""
Real brokers for the tests: finds, installs, starts, stops, kills and freezes them.

From a shell: `python -m tests.brokers up | down | status | env | run -- COMMAND`, and `restart`, `kill9`, `pause`,
`resume` with a name. From a test: `with local("redis", directory) as server: ...`, a private instance.
"""

from tests.brokers.broker import BrokerError
from tests.brokers.fleet import local
from tests.brokers.server import Server
from tests.brokers.table import BROKERS

__all__ = ["BROKERS", "BrokerError", "Server", "local"]
