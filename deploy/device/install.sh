#!/bin/sh
# Installs Covey's client on this device by hand, from a bundle that `make bundle` made.
# The bundle itself holds this file: tar -xJf covey-VERSION-SYSTEM.tar.xz share/install.sh
set -eu

usage() {
    cat >&2 <<TEXT
usage: sudo sh install.sh covey-VERSION-SYSTEM.tar.xz --ticket FILE|- [--data DIR]
       sudo sh install.sh covey-VERSION-SYSTEM.tar.xz --broker mqtts://HOST [--device-id NAME] [--data DIR]
  --ticket     enrols this device, and is removed; without one it makes a request for its operator
  --device-id  its name in the fleet (default: its host name)
  --data       folder of its own data (default: /srv/covey)
TEXT
    exit 2
}

bundle= broker= ticket= data=/srv/covey
device=$(uname -n | cut -d. -f1 | tr '[:upper:]' '[:lower:]')
while [ $# -gt 0 ]; do
    case $1 in
    --broker | --ticket | --device-id | --data)
        [ $# -ge 2 ] || usage
        case $1 in
        --broker) broker=$2 ;;
        --ticket) ticket=$2 ;;
        --device-id) device=$2 ;;
        --data) data=$2 ;;
        esac
        shift
        ;;
    -*) usage ;;
    *) [ -z "$bundle" ] || usage; bundle=$1 ;;
    esac
    shift
done
[ -f "$bundle" ] && [ -n "$broker$ticket" ] || usage
case $broker$device$data in
*[!A-Za-z0-9.:/_-]*) echo "install.sh: an unusable character in $broker, $device or $data" >&2; exit 2 ;;
esac
[ "$(id -u)" = 0 ] || { echo "install.sh: run this as root (sudo)" >&2; exit 1; }

folder=$(mktemp -d /var/tmp/covey.XXXXXX)
trap 'shred -u "$folder/enrolment.ticket" 2>/dev/null; rm -rf "$folder"' EXIT
cp "$bundle" "$folder/"
(cd "$folder" && sha256sum "$(basename "$bundle")" >bundles.sha256)
tar -xJf "$bundle" -C "$folder" --strip-components=1 share/setup.sh
{
    echo "COVEY_DEVICE_ID=$device"
    echo "COVEY_DATA=$data"
    [ -z "$broker" ] || echo "COVEY_BROKER=$broker"
} >"$folder/edge.env"
if [ -n "$ticket" ]; then (umask 077 && cat -- "$ticket" >"$folder/enrolment.ticket"); fi
sh "$folder/setup.sh"
if [ -f "$ticket" ]; then shred -u "$ticket" 2>/dev/null || rm -f "$ticket"; fi
