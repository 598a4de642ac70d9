#!/bin/sh
# Installs Covey's client on this device and brings it into its fleet, from the folder that this file is in.
# Run as root: by covey-setup.service at the first boot, by install.sh, or by `covey flash --ssh`.
# Every step first looks whether it is done, and nothing takes its place before it is whole. So whenever
# the power is cut, running this again goes on.
#
# COVEY_ROOT installs below another folder, for tests.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=${COVEY_ROOT:-}
opt=$root/opt/covey
state=$root/var/lib/covey
units=$root/etc/systemd/system

say() { echo "covey-setup: $*"; }
fail() { say "$*" >&2; exit 1; }

# A file in its place: whole or not at all.
place() {
    cp "$1" "$2.new"
    chmod "$3" "$2.new"
    sync
    mv -f "$2.new" "$2"
}

as_client() { setpriv --reuid=covey --regid=covey --clear-groups "$@"; }

# --- the client, as a folder of its version -----------------------------------------------------------
codename=$(. "$root/etc/os-release" && echo "${VERSION_CODENAME:-unknown}")
bundle=
for file in "$here"/covey-*-"$codename"-arm64.tar.xz; do
    if [ -f "$file" ]; then bundle=$file; fi
done
mkdir -p "$opt/versions" "$root/etc/covey" "$units" "$state"
if [ -n "$bundle" ]; then
    name=$(basename "$bundle")
    version=${name#covey-}
    version=${version%-"$codename"-arm64.tar.xz}
    if [ ! -d "$opt/versions/$version" ]; then
        (cd "$here" && grep -F "  $name" bundles.sha256 | sha256sum -c - >/dev/null) ||
            fail "$name is damaged: write the card again"
        say "installing the client $version"
        rm -rf "$opt/versions/.$version"
        mkdir "$opt/versions/.$version"
        tar -xJf "$bundle" -C "$opt/versions/.$version" --no-same-owner
        "$opt/versions/.$version/bin/covey-edge" --help >/dev/null ||
            fail "the client does not run here: is its bundle for this system?"
        # Else every start would compile all of it again: the client itself cannot write there.
        "$opt/versions/.$version/bin/covey-compile" -q -j 0 -s "$opt/versions/.$version" -p "$opt/versions/$version" \
            "$opt/versions/.$version/site" || say "some bytecode is missing: the client starts more slowly"
        sync
        mv -T "$opt/versions/.$version" "$opt/versions/$version"
    fi
    # A version that came later by an update stays.
    if [ ! -e "$opt/current" ]; then
        ln -sfn "versions/$version" "$opt/current.new"
        sync
        mv -fT "$opt/current.new" "$opt/current"
        sync
    fi
fi
# What updates go back to, and run from.
if [ ! -e "$opt/good" ] && [ -e "$opt/current" ]; then
    ln -sfn "$(readlink "$opt/current")" "$opt/good.new"
    mv -fT "$opt/good.new" "$opt/good"
    sync
fi
[ -x "$opt/current/bin/covey-edge" ] ||
    fail "there is no client for $codename in $here: covey flash --bundle covey-VERSION-$codename-arm64.tar.xz"

# --- who it runs as, and how ----------------------------------------------------------------------------
id -u covey >/dev/null 2>&1 ||
    useradd --system --user-group --home-dir /var/lib/covey --no-create-home --shell /usr/sbin/nologin covey
chown covey:covey "$state"
chmod 700 "$state"
if [ -f "$here/edge.env" ]; then place "$here/edge.env" "$root/etc/covey/edge.env" 644; fi
[ -f "$root/etc/covey/edge.env" ] || fail "there is no edge.env in $here"
. "$root/etc/covey/edge.env"
mkdir -p "$root$COVEY_DATA"
chown covey:covey "$root$COVEY_DATA"
for unit in "$opt/current/systemd"/*; do
    if [ -f "$unit" ]; then place "$unit" "$units/$(basename "$unit")" 644; fi
done
mkdir -p "$root/usr/local/bin"
ln -sfn /opt/covey/current/bin/covey-edge "$root/usr/local/bin/covey-edge"
sync
systemctl daemon-reload
systemctl enable --quiet covey-edge.service covey-update.service covey-update.path

# --- into the fleet ---------------------------------------------------------------------------------------
edge=$opt/current/bin/covey-edge
refused=
# On a card, wear levelling may keep an old block: that is why a ticket lets one device in, once.
forget_ticket() { shred -u "$here/enrolment.ticket" 2>/dev/null || rm -f "$here/enrolment.ticket"; }
if [ ! -f "$state/enrolment.json" ]; then
    if [ -f "$here/enrolment.ticket" ]; then
        # The key is made here. A ticket that is used twice by the same key gives the same certificate.
        # It waits for the network and the service, and ends with 6 when the ticket lets nobody in.
        code=0
        as_client "$edge" enroll --state "$state" --ticket - --retry <"$here/enrolment.ticket" || code=$?
        case $code in
        0) ;;
        6) refused=yes && forget_ticket ;;
        *) exit "$code" ;;
        esac
    elif [ ! -f "$state/device.csr" ]; then
        as_client "$edge" init --state "$state" --device-id "$COVEY_DEVICE_ID"
    fi
fi
sync

# --- the card keeps no way in, and this is not run again ---------------------------------------------------
if [ -f "$state/enrolment.json" ]; then
    # Root's own copy of whom this device obeys: updates are checked against this one.
    # Read as the client, and not without end: root would follow a link that the client has put there.
    trusted=$root/etc/covey/enrolment.json
    as_client head -c 65536 "$state/enrolment.json" >"$trusted.new"
    chmod 644 "$trusted.new"
    sync
    mv -f "$trusted.new" "$trusted"
    forget_ticket
    say "enrolled: starting the client"
    systemctl restart --no-block covey-edge.service covey-update.path
elif [ -n "$refused" ]; then
    say "the ticket was refused; make another one: covey flash --ssh USER@$COVEY_DEVICE_ID --tickets FILE"
else
    say "waiting to be enrolled: covey flash --ssh USER@$COVEY_DEVICE_ID"
fi
rm -f "$here"/covey-*.tar.xz "$here/bundles.sha256" "$here/edge.env"
sync
rm -f "$here/setup.sh"
sync
