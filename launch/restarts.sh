# Sourced by torchrun.sh and deepspeed.sh, which define `attempt NUMBER ARGUMENT...`: one start of the run, numbered from 0.
#
# `run_with_restarts ARGUMENT...` runs attempts until one succeeds, one is refused for good (a setting, a file: what trying again
# cannot mend), or RESTARTS (0) further ones have failed, and returns the status of the last; RESTART_PAUSE (10) seconds lie
# between them. SIGTERM and Ctrl-C are passed on, so that the run saves and ends, and end the restarts.

run_with_restarts() {
    local restarts=${RESTARTS:-0} number=0 stopping= signalled= child= status
    if [[ $restarts -eq 0 ]]; then
        attempt 0 "$@"
    fi
    # Launchers have one exit status for everything: dash_dist.run.restarts makes the file if an attempt was refused.
    told=$(mktemp -d)
    export DASH_DIST_REFUSED=$told/refused DASH_DIST_SINCE=$EPOCHSECONDS
    trap 'rm -rf -- "$told"' EXIT
    trap 'stopping=yes signalled=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
    while :; do
        attempt "$number" "$@" &
        child=$!
        while :; do
            status=0
            wait "$child" || status=$?
            # A signal ends `wait`, and not the run.
            [[ -n $signalled && $status -gt 128 ]] || break
            signalled=
        done
        if [[ $status -eq 0 || -n $stopping || $number -ge $restarts || -e $DASH_DIST_REFUSED ]]; then
            return "$status"
        fi
        number=$((number + 1))
        echo "the run failed with status $status: starting it again ($number of $restarts)" >&2
        # The ranks on other nodes fail some seconds later, and the port must be free again.
        sleep "${RESTART_PAUSE:-10}" &
        wait $! || true
        [[ -z $stopping ]] || return "$status"
    done
}
