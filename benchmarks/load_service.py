"""The real service, that notes when each message is durably accounted for.

    python benchmarks/load_service.py FILE aggregator run --state DIR --broker URL

At its end it writes FILE: the session of every check-in and the moment of its acknowledgement, on the clock
that all processes of a machine share. Everything else is `covey`, which knows nothing of it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from aggregator.adapters.mqtt import MqttTransport
from aggregator.transport import Delivery
from protocol import topics
from protocol.codec import decode_from_device
from protocol.messages import DeviceStatus

if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    seen: list[tuple[bytes, float]] = []
    acknowledge = MqttTransport.acknowledge

    def noting(self: MqttTransport, delivery: Delivery) -> None:
        acknowledge(self, delivery)
        if topics.parse_up(delivery.topic) is not None:  # the broker itself answers, too
            seen.append((delivery.payload, time.monotonic()))

    MqttTransport.acknowledge = noting  # type: ignore[method-assign]
    from aggregator.cli import main

    try:
        main()
    finally:
        moments = {}
        for payload, at in seen:
            message = decode_from_device(payload)[0]
            if isinstance(message, DeviceStatus):
                moments.setdefault(message.session.hex(), at)
        target.write_text(json.dumps(moments))
