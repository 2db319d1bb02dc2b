"""The same workloads by hand, with each broker's own client used well: pipelined, batched, on asyncio.

One module per backend, each with `run(url, workload, messages, size) -> Result`. They confirm every publish and ack
every message, as unistream does.
"""
