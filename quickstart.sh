#!/usr/bin/env bash
# Sets up .venv, and runs the demo or the checks.
#
#   ./quickstart.sh           setup, then the demo: fine-tunes the small model in demo/ on drawn
#                             images, on a CPU, without a download; minutes, no question asked
#   ./quickstart.sh demo --max_steps 20
#                             the same with flags of train_sam3_lora.py, here a training of seconds
#   ./quickstart.sh setup     make .venv and install into it
#   ./quickstart.sh test      setup, then ruff, the unit tests and the scripts' tests (CPU, offline)
#
# PYTHON names the interpreter that .venv is made with (default: python3).
set -euo pipefail
cd "$(dirname "$0")"

requirements=(requirements.txt requirements-dev.txt)
stamp=.venv/.requirements

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0"
}

setup() {
    local python=${PYTHON:-python3}
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
    if ! command -v "$python" >/dev/null; then
        echo "error: $python was not found; install Python 3.11 or newer, or set PYTHON to it" >&2
        exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, $python is $("$python" -V 2>&1);" \
            "set PYTHON to a newer one, and remove .venv if it is the old one" >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # An install is skipped while the requirements are what they were at the last one.
    if ! cat "${requirements[@]}" | cmp -s - "$stamp"; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
        cat "${requirements[@]}" >"$stamp"
    fi
}

run_tests() {
    .venv/bin/python -m ruff check .
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    .venv/bin/python -m pytest -q -m "not (scripts or slow or gpu or weights)"
    .venv/bin/python -m pytest -q -m scripts
}

# Prints a command, then runs it.
run() {
    printf '\n$ python'
    printf ' %q' "$@"
    printf '\n'
    .venv/bin/python "$@"
}

look_around() {
    .venv/bin/python - <<'PYTHON'
import platform

import huggingface_hub
import torch

print(f"Python {platform.python_version()}, torch {torch.__version__}")
gpu = "none: the demo runs on the CPU"
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_name()
elif torch.backends.mps.is_available():
    gpu = "Apple MPS"
print(f"GPU: {gpu}")
token = huggingface_hub.get_token()
print(f"Hugging Face: {'logged in' if token else 'not logged in; only SAM 3 itself needs it'}")
PYTHON
}

# Runs the demo; its arguments go to the training.
demo() {
    export HF_HUB_OFFLINE=1
    local out=outputs/demo photo=data/demo/test/images/00001.jpg box='[[61, 14, 121, 73]]'
    local adapter=(--lora_weights "$out/best_model" --image "$photo")
    look_around
    run prepare_data.py demo --output_dir data/demo --overwrite
    run train_sam3_lora.py --config configs/demo_config.yaml --overwrite "$@"
    run evaluate_sam3_lora.py --lora_weights "$out/best_model" --data_dir data/demo --split test \
        --compare --output_dir "$out/evaluation" --overwrite
    run inference.py "${adapter[@]}" --text_prompt "oil leak" --output "$out/text.png"
    run inference.py "${adapter[@]}" --bboxes "$box" --output "$out/box.png"
    run inference.py "${adapter[@]}" --text_prompt "oil leak" --bboxes "$box" \
        --output "$out/text_and_box.png"
    run export_sam3_lora.py peft --lora_weights "$out/best_model" --output_dir "$out/peft" --overwrite
    echo
    echo "before and after   $out/evaluation/panel.png"
    echo "loss curve         $out/curves.png"
    echo "overlays           $out/text.png $out/box.png $out/text_and_box.png"
    echo "                   a box is an example: without a word, like kinds are told apart less"
    echo "                   well, so box.png may mark a burn mark beside the oil leaks"
    echo "for stock PEFT     $out/peft"
}

case "${1:-demo}" in
    demo)
        setup
        demo "${@:2}"
        ;;
    setup)
        setup
        ;;
    test)
        setup
        run_tests
        ;;
    -h | --help)
        usage
        ;;
    *)
        echo "error: unknown command '$1'; expected demo, setup, test or nothing, for the demo" >&2
        exit 2
        ;;
esac
