#!/usr/bin/env bash
# Makes the nano checkpoint from nothing: teacher speech, tokenizers, speaker encoder, vocoder, language model, flow,
# and the finished folder OUT/checkpoint. Every stage goes on from its last state when the same command runs again.
#
#   scripts/train_nano.sh SPEECH OUT [DEVICE]
#
# SPEECH holds the recorded sets, each a folder with a transcripts.tsv (README.md says how to make them); flite,
# festival and espeak-ng must be on the PATH. One GPU trains several stages at a time: first the two tokenizers, on
# which everything rests, then vocoder and speaker encoder with the language model and the flow beside them.
# Minutes of each part: LISTEN, SPEAKER, VOCODER, LM, FLOW in the environment.
set -euo pipefail

speech=$1 out=$2 device=${3:-auto}
configs=${CONFIGS:-configs/train/nano} python=${PYTHON:-python} workers=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out/logs"

stage() { # name, minutes or nothing, niceness
    local begin=$SECONDS
    nice -n "${3:-0}" "$python" scripts/train.py --stage "$1" --configs "$configs" --out "$out" --speech "$speech" --device "$device" \
        --workers "$workers" ${2:+--minutes "$2"} >"$out/logs/$1.log" 2>&1 || {
        echo "$1 failed: $(tail -n 3 "$out/logs/$1.log")" | tee -a "$out/logs/stages.txt"
        return 1
    }
    echo "$1: $((SECONDS - begin)) s, $SECONDS s after the start" | tee -a "$out/logs/stages.txt"
}

stage data
stage linguistic "${LISTEN:-8}" & linguistic=$!
stage semantic "${LISTEN:-8}" & semantic=$!
stage features "" 10 & features=$!
wait $linguistic
wait $semantic
wait $features
stage vocoder "${VOCODER:-22}" & vocoder=$!
stage speaker "${SPEAKER:-4}" & speaker=$!
stage codes
stage lm "${LM:-18}" & lm=$!
wait $speaker
stage flow "${FLOW:-12}" & flow=$!
wait $vocoder
wait $flow
wait $lm
stage assemble
