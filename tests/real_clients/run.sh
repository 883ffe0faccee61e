#!/bin/sh
# Asks a demo server with other people's clients, each in an environment of its own:
#
#     tests/real_clients/run.sh FOLDER          # about 3 GB of packages; rows of docs/clients.md
#
# PYTHON and PIP_ARGS as for make. The server is on loopback, ports 8123 and 4001.
set -eu
cd "$(dirname "$0")/../.."
here=$PWD/tests/real_clients
work=$(mkdir -p "$1" && cd "$1" && pwd)
url=http://127.0.0.1:8123 proxy=http://127.0.0.1:4001

environment() { # NAME REQUIREMENTS
    [ -e "$work/$1/.installed" ] && return
    "${PYTHON:-python3}" -m venv "$work/$1"
    echo torch==2.13.0 > "$work/constraints.txt"
    # shellcheck disable=SC2086
    "$work/$1/bin/pip" install --quiet ${PIP_ARGS:-} -c "$work/constraints.txt" -r "$here/$2"
    touch "$work/$1/.installed"
}
environment clients requirements.txt
environment instructor requirements-instructor.txt
environment litellm requirements-litellm.txt
environment lm-eval requirements-lm-eval.txt

until_it_answers() { # URL
    for _ in $(seq 90); do
        curl --silent --fail --output /dev/null "$1/v1/models" && return
        sleep 2
    done
    echo "$1 does not answer" >&2
    exit 1
}

# The demo's weights, with a template that has a place for tools.
mkdir -p "$work/demo"
ln -sf "$PWD"/models/demo/* "$work/demo"
cp "$here/chat_template.jinja" "$work/demo"

started=
# shellcheck disable=SC2086
trap 'kill $started 2> /dev/null; wait' EXIT
.venv/bin/baton up --model "$work/demo" --prefill 1 --decode 1 --http-port 8123 \
    > "$work/baton.log" 2>&1 &
started="$started $!"
until_it_answers $url
LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true \
    "$work/litellm/bin/litellm" --config "$here/litellm.yaml" --host 127.0.0.1 --port 4001 \
    --telemetry False > "$work/litellm.log" 2>&1 &
started="$started $!"
until_it_answers $proxy

"$work/clients/bin/python" "$here/ask.py" $url $proxy
"$work/instructor/bin/python" "$here/ask_instructor.py" $url
cd "$here/lm_eval"
HF_HUB_OFFLINE=1 "$work/lm-eval/bin/lm_eval" run --model local-completions --batch_size 4 \
    --model_args "model=demo,base_url=$url/v1/completions,tokenizer=$work/demo,tokenizer_backend=huggingface" \
    --tasks verses,verses_gen,verses_ppl --include_path . 2> "$work/lm-eval.log"
