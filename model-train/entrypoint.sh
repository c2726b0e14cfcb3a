#!/usr/bin/env -S --block-signal=HUP,INT,QUIT,TERM bash
# Starts a stage's program as PID 1: as root it first becomes the owner of ./data, without capabilities.
#
# Signals stay blocked until the program has installed its handlers: PID 1 ignores those that it has no handler for.
# bash passes the blocked signals on; sh, which is dash, would unblock them.
set -eu
# matplotlib wants a folder that it can write to; without its list of fonts, it takes 0.1 s to make one.
cp -rp /opt/venv/matplotlib /dev/shm 2>/dev/null || true
if [ "$(id -u)" -eq 0 ]; then
  exec setpriv --reuid="$(stat -c %u /opt/mount/data)" --regid="$(stat -c %g /opt/mount/data)" --clear-groups \
    --inh-caps=-all --bounding-set=-all --no-new-privs python "$@"
fi
exec python "$@"
