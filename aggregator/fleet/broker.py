"""The fleet's broker: who may do what on it, and the certificates that prove who is who. Pure.

Mutual TLS says who a client is: its certificate's common name becomes its user name and its client id, so
that no device can act or connect as another. What each may do, mosquitto's dynamic security plugin decides
(`aggregator.fleet.access`): it ends the connection of a device that is revoked, which neither access rules in
a file nor a list of revoked certificates do.

The aggregator's certificate holds a P-256 key and a common name that no device can have, since a device id
holds no dot: nobody can enrol as the aggregator, and nobody takes this certificate for a device's.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.fleet.authority import Authority, EnrolmentRefused
from protocol import identity
from protocol.codec import MAX_FRAME_BYTES

AGGREGATOR = "covey.aggregator"
"""The aggregator's user name and client id at the broker."""

BROKER = "covey-broker"
"""Common name of the broker's certificate; clients look at its host names, not at this."""

DAYS = 730
CA_FILE = "ca.pem"
CERTIFICATE_FILE = "server.pem"
KEY_FILE = "server-key.pem"
ACCESS_FILE = "access.json"
"""What the plugin starts with, as the aggregator wrote it last."""
REVOKED_FILE = "revoked.pem"
"""Certificates that the broker refuses before anybody speaks MQTT."""
START_FILE = "start"
DATA_DIRECTORY = "data"

_TOPIC_BYTES = 1024
_QUEUED_BYTES = 256 * 2**20

# Paths are relative, so that one directory serves a unit of systemd, a container and a shell alike.
# Practically no limit by count: a slow subscriber would lose acknowledged messages to it without notice.
# Not 0 for none: mosquitto 2.0.11 then hangs up on who publishes what it may not, in place of refusing that.
# Saved every minute: each time syncs everything to the disk, and the broker serves nobody meanwhile. Nothing
# relies on it: devices and the aggregator say again after a reconnect what the broker may have forgotten.
_CONFIGURATION = """\
# mosquitto 2 for the fleet {fleet}; `covey aggregator broker` writes it anew. Start it by ./{start}.

listener {port}
cafile {ca}
certfile {certificate}
keyfile {key}
tls_version tlsv1.2

# Who shows no certificate of the fleet is not let in; who does is who it says, and nobody else.
allow_anonymous false
require_certificate true
use_identity_as_username true
use_username_as_clientid true
crlfile {data}/{revoked}

# Nobody may do anything but what this plugin allows, which the aggregator tells it. Without the plugin, the
# broker does not start. Found by the system's linker, wherever a distribution puts it.
plugin mosquitto_dynamic_security.so
plugin_opt_config_file {data}/{access}

max_packet_size {packet}
max_keepalive 600
max_queued_messages 1000000
max_queued_bytes {queued}
max_inflight_messages 512
persistent_client_expiration 14d
set_tcp_nodelay true

persistence true
persistence_location {data}/
autosave_interval 60

log_dest stderr
log_type error
log_type warning
log_type notice
"""


# The plugin of mosquitto 2.0 writes its file in place: a power cut could leave half of it, and nobody would
# be let in, not even the aggregator. So it works on a copy. A list of revoked certificates is taken up by a
# reload, for which the broker needs a signal from its own machine: hence the loop, which ends with it.
_START = """\
#!/bin/sh
# Starts the broker with the access that the aggregator wrote last.
case "$0" in */*) cd "${{0%/*}}" || exit 1 ;; esac
if [ "$(id -u)" = 0 ]; then
    # Root's mosquitto becomes another user before it reads its keys: it is to be the one who owns them.
    owner=$(stat -c %u .)
    if [ "$owner" = 0 ]; then
        echo "covey: mosquitto gives up root's rights before it reads its keys, which are root's here." >&2
        echo "Give the state to who runs the aggregator (chown -R USER: STATE), and start this again." >&2
        exit 1
    fi
    exec setpriv --reuid="$owner" --regid="$(stat -c %g .)" --clear-groups sh {start}
fi
cp {access} {data}/{access} || exit 1
cp {revoked} {data}/{revoked} || exit 1
PATH="$PATH:/usr/sbin:/usr/local/sbin"
(
    while sleep 2 && kill -0 $$ 2>/dev/null; do
        cmp -s {revoked} {data}/{revoked} && continue
        cp {revoked} {data}/{revoked} && kill -HUP $$
    done
) &
exec mosquitto -c {configuration}
"""


def start_script(configuration_file: str) -> str:
    """The text of the script that starts the broker."""
    return _START.format(
        access=ACCESS_FILE,
        revoked=REVOKED_FILE,
        data=DATA_DIRECTORY,
        start=START_FILE,
        configuration=configuration_file,
    )


def configuration(fleet: str, port: int) -> str:
    """The text of `mosquitto.conf`, for mosquitto 2.

    Args:
        fleet: its name, for the comment.
        port: TCP port to listen at, on all addresses.
    """
    return _CONFIGURATION.format(
        fleet=fleet,
        port=port,
        ca=CA_FILE,
        certificate=CERTIFICATE_FILE,
        key=KEY_FILE,
        revoked=REVOKED_FILE,
        access=ACCESS_FILE,
        start=START_FILE,
        packet=MAX_FRAME_BYTES + _TOPIC_BYTES,
        queued=_QUEUED_BYTES,
        data=DATA_DIRECTORY,
    )


def issue_aggregator(authority: Authority, key: EllipticCurvePublicKey, *, now: float, serial: int) -> bytes:
    """Issues the certificate by which the broker knows the aggregator; returns PEM.

    Args:
        authority: with the CA's key.
        key: the aggregator's public key.
        now: seconds since 1970.
        serial: a random positive integer of at most 159 bits.

    Raises:
        EnrolmentRefused: the CA's key is kept elsewhere.
    """
    if authority.ca_key is None:
        raise EnrolmentRefused(
            "the broker's files need the CA's key, which is kept elsewhere: put it back among the keys "
            "for a moment"
        )
    certificate = identity.issue(
        authority.ca_key,
        authority.ca,
        AGGREGATOR,
        key,
        ExtendedKeyUsageOID.CLIENT_AUTH,
        now=int(now),
        days=DAYS,
        serial=serial,
    )
    return certificate.public_bytes(Encoding.PEM)
