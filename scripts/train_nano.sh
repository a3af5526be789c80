#!/usr/bin/env bash
# Makes the nano checkpoint from nothing: teacher speech, tokenizers, speaker encoder, vocoder, language model, flow,
# and the finished folder OUT/checkpoint. Every stage goes on from its last state when the same command runs again.
#
#   scripts/train_nano.sh SPEECH OUT [DEVICE [SECOND_DEVICE]]
#
# SPEECH holds the recorded sets, each a folder with a transcripts.tsv (README.md says how to make them); flite,
# festival and espeak-ng must be on the PATH. With one device the tokenizers, on which everything rests, train first,
# then the vocoder and the speaker encoder with the language model and the flow beside them; a second device takes the
# semantic tokenizer, the speaker encoder and the language model.
# Minutes of each part: LISTEN, SPEAKER, VOCODER, LM, FLOW in the environment.
set -euo pipefail

speech=$1 out=$2 first=${3:-auto} second=${4:-${3:-auto}}
configs=${CONFIGS:-configs/train/nano} python=${PYTHON:-python} workers=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out/logs"

stage() { # name, device, minutes or nothing
    local begin=$SECONDS
    "$python" scripts/train.py --stage "$1" --configs "$configs" --out "$out" --speech "$speech" --device "$2" \
        --workers "$workers" ${3:+--minutes "$3"} >"$out/logs/$1.log" 2>&1 || {
        echo "$1 failed: $(tail -n 3 "$out/logs/$1.log")" | tee -a "$out/logs/stages.txt"
        return 1
    }
    echo "$1: $((SECONDS - begin)) s, $SECONDS s after the start" | tee -a "$out/logs/stages.txt"
}

stage data "$first"
stage linguistic "$first" "${LISTEN:-8}" & linguistic=$!
stage semantic "$second" "${LISTEN:-8}" & semantic=$!
stage features "$first"
if [ "$first" = "$second" ]; then wait $linguistic; wait $semantic; fi
stage vocoder "$first" "${VOCODER:-12}" & vocoder=$!
stage speaker "$second" "${SPEAKER:-4}" & speaker=$!
wait $linguistic
wait $semantic
stage codes "$first"
stage lm "$second" "${LM:-10}" & lm=$!
wait $speaker
stage flow "$first" "${FLOW:-7}" & flow=$!
wait $vocoder
wait $flow
wait $lm
stage assemble "$first"
