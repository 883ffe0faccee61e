#!/usr/bin/env bash
# The containers of this tree: `compose.sh build|up|scale ROLE N|logs [ROLE]|down`, for the Makefile.
#
#   COMPOSE   the command: docker compose, or docker-compose
#   GPU       1: with compose.gpu.yaml
#
# All else is of compose.yaml, from the environment or the file .env. A model is looked at before
# the engine is asked: it makes a directory of a path that is not there. A role that cannot start
# ends this with its own last line, and its restarts.
set -euo pipefail

readonly ROLES=(prefill decode)
readonly MOST_RESTARTS=3

main() {
    cd "$(dirname "$0")/.."
    local verb=$1
    shift
    use_files "${GPU:-0}"
    case $verb in
        build) find_model; compose build gateway ;;
        up) find_model; compose build gateway; up ;;
        scale) scale "$@" ;;
        logs) compose logs --follow --tail 100 "$@" ;;
        down) compose down --remove-orphans "$@" ;;
        *) fail "no such verb: $verb" ;;
    esac
}

fail() {
    echo "$1" >&2
    exit "${2:-1}"
}

use_files() {
    FILES=(-f compose.yaml)
    if [[ $1 != 0 && -n $1 ]]; then FILES+=(-f compose.gpu.yaml); fi
}

compose() {
    # shellcheck disable=SC2086  # two words: docker compose
    command $COMPOSE "${FILES[@]}" "$@"
}

# MODEL becomes an absolute path, MODEL_LINKS the directory that its files are links into.
find_model() {
    if [[ -z ${MODEL:-} && -f .env ]]; then
        MODEL=$(sed -n 's/^MODEL=//p' .env | tail -n 1 | sed -E "s/^(['\"])(.*)\1\$/\2/")
    fi
    if [[ -z ${MODEL:-} ]]; then return; fi
    if [[ $MODEL != */* && ! -d $MODEL ]]; then
        # The name of one that was fetched, as in shared/model_files/named.py.
        local caches=${XDG_CACHE_HOME:-}
        [[ $caches == /* ]] || caches=${HOME:-}/.cache
        local fetched=${BATON_CACHE_DIR:-$caches/baton}/models/$MODEL
        if [[ -d $fetched ]]; then MODEL=$fetched; fi
    fi
    MODEL=$(realpath -s -m -- "$MODEL")
    [[ ! -f $MODEL ]] || fail "MODEL=$MODEL: a file; containers take a directory" 2
    [[ -d $MODEL ]] || fail "MODEL=$MODEL: no such directory" 2
    [[ -f $MODEL/config.json ]] || fail "MODEL=$MODEL: no config.json in it, or a link to nowhere" 2
    export MODEL
    may_be_entered "$MODEL"
    if [[ -n ${MODEL_LINKS:-} ]]; then return; fi
    local directories
    directories=$(linked_directories "$MODEL" | sort -u)
    if [[ $directories == *$'\n'* ]]; then
        fail "MODEL=$MODEL: its files are links into several directories; name in MODEL_LINKS one \
that holds them all: ${directories//$'\n'/, }" 2
    fi
    export MODEL_LINKS=$directories
    may_be_entered "$directories"
}

# The image has a folder /root, which is for root only, and the roles are another user.
may_be_entered() {
    [[ $1/ != /root/* ]] || fail "$1: nobody but root may look into /root of a container; move \
the model elsewhere" 2
}

# Where the links in a directory lead, link after link, as far as that is elsewhere: the cache of
# Hugging Face keeps a snapshot's files in blobs/ beside it.
linked_directories() {
    local link path
    find "$1" -maxdepth 1 -type l | while IFS= read -r link; do
        path=$link
        while [[ -L $path ]]; do
            path=$(realpath -s -m -- "$(dirname "$path")/$(readlink_from_here "$path")")
            case $path in
                "$1"/*) ;;
                *) dirname "$path" ;;
            esac
        done
    done
}

# A link's target, relative to the link's directory.
readlink_from_here() {
    local target
    target=$(readlink "$1")
    case $target in
        /*) realpath -s -m --relative-to="$(dirname "$1")" -- "$target" ;;
        *) echo "$target" ;;
    esac
}

up() {
    local role count scales=()
    for role in "${ROLES[@]}"; do
        count=$(compose ps -q "$role" | wc -l)
        if ((count > 1)); then
            echo "$role: $count containers, as scaled before"
            scales+=(--scale "$role=$count")
        fi
    done
    watched up -d --no-build "${scales[@]}"
    for _ in {1..60}; do
        if compose exec -T gateway baton health 127.0.0.1:50051 --service gateway 2>/dev/null; then
            echo "gRPC on $(compose port gateway 50051), HTTP on $(compose port gateway 8000)"
            return
        fi
        end_if_failing
        sleep 1
    done
    fail "the gateway does not serve; see make logs"
}

# scale ROLE N: what the containers that run were given counts, whatever the environment says now.
scale() {
    local role=${1:-} count=${2:-} other id
    [[ " ${ROLES[*]} " == *" $role "* && -n $role && $count =~ ^[0-9]+$ ]] \
        || fail "make scale ROLE=prefill|decode N=number" 2
    for other in "$role" "${ROLES[@]}"; do
        id=$(compose ps -q "$other" | head -n 1)
        if [[ -n $id ]]; then break; fi
    done
    [[ -n $id ]] || fail "nothing runs that could be scaled: make up first"
    take_settings "$id"
    watched up -d --no-build --no-deps --no-recreate --scale "$role=$count" "$role"
    until all_healthy "$role"; do
        end_if_failing
        sleep 1
    done
}

take_settings() {
    local name line
    MODEL=$(docker inspect -f '{{index .Config.Labels "baton.model"}}' "$1")
    MODEL_LINKS=$(docker inspect -f '{{index .Config.Labels "baton.model-links"}}' "$1")
    IMAGE=$(docker inspect -f '{{.Config.Image}}' "$1")
    export MODEL MODEL_LINKS IMAGE
    while IFS= read -r line; do
        name=${line%%=*}
        case $name in
            BATON_DEVICE) if [[ $line == *=cuda ]]; then use_files 1; fi ;;
            BATON_MODEL) ;;
            BATON_*) if grep -q "\${$name:-" compose.yaml; then export "$line"; fi ;;
        esac
    done < <(docker inspect -f '{{range .Config.Env}}{{println .}}{{end}}' "$1")
}

all_healthy() {
    local id
    for id in $(compose ps -q "$1"); do
        [[ $(docker inspect -f '{{.State.Health.Status}}' "$id") == healthy ]] || return 1
    done
}

# Runs compose, and ends it when a role turns out to be unable to start.
watched() {
    declare -gA RESTARTS=() ENDED=()
    local id restarts ended running code=0
    while read -r id restarts ended _; do
        RESTARTS[$id]=$restarts ENDED[$id]=$ended
    done < <(states)
    compose "$@" &
    running=$!
    while kill -0 $running 2>/dev/null; do
        end_if_failing $running
        sleep 1
    done
    wait $running || code=$?
    end_if_failing
    if ((code)); then
        fail "compose failed; see above, and make logs" $code
    fi
}

# ID RESTARTS ENDED STATUS CODE OOM SERVICE of each container of ours; ENDED is when it last did.
states() {
    local ids
    mapfile -t ids < <(compose ps -a -q)
    if ((${#ids[@]})); then
        docker inspect -f '{{.Id}} {{.RestartCount}} {{.State.FinishedAt}} {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{index .Config.Labels "com.docker.compose.service"}}' "${ids[@]}" 2>/dev/null || true
    fi
}

# A role that has no use for restarts says so by code 2; one that was restarted too often says it
# no better. `end_if_failing [PID]`: PID is compose, which waits for the role's health; as long as it
# runs, it may yet replace the containers that were there before.
end_if_failing() {
    local id restarts before ended status code is_oom service why
    while read -r id restarts ended status code is_oom service; do
        if [[ -n ${1:-} && -n ${RESTARTS[$id]:-} ]]; then continue; fi
        before=${RESTARTS[$id]:-0}
        # The engine counts anew when a container is started by hand.
        if ((restarts < before)); then before=0; fi
        if ((restarts - before < MOST_RESTARTS)); then
            [[ $status =~ ^(restarting|exited)$ && $code == 2 ]] || continue
            [[ $ended != "${ENDED[$id]:-}" ]] || continue
        fi
        if [[ -n ${1:-} ]]; then kill "$1" 2>/dev/null || true; fi
        why=$(last_line "$id")
        if [[ $is_oom == true ]]; then why="killed for want of memory; $why"; fi
        stop_unhealthy
        fail "$service: $why"
    done < <(states)
}

# The others fail likewise, or wait for what fails: none of them is to go on by itself.
stop_unhealthy() {
    local id ids=()
    for id in $(compose ps -a -q); do
        if [[ $(docker inspect -f '{{.State.Health.Status}}' "$id" 2>/dev/null) != healthy ]]; then
            ids+=("$id")
        fi
    done
    docker stop -t 1 "${ids[@]}" >/dev/null 2>&1 || true
}

last_line() {
    local lines
    lines=$(docker logs --tail 200 "$1" 2>&1)
    grep -E '^baton [a-z]+: ' <<<"$lines" | tail -n 1 || tail -n 1 <<<"$lines"
}

main "$@"
