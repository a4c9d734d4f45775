#!/bin/sh
# Makes all that docs/quality/ holds: sh models/evaluate.sh MODEL.gguf TEXTS JOURNALS
#
# TEXTS: folder with the text that was held out in training, and no other. JOURNALS: folder for what
# is finished; the same command goes on from there. Takes hours on two cores.
set -eu
model=$1 texts=$2 journals=$3
cd "$(dirname "$0")/.."
mkdir -p "$journals" docs/quality
policies=full,full-q8_0,full-q4_0,razor,razor-q8_0,razor-q4_0,local,streaming,razor-no-comp
policies=$policies,random-heads=1,random-heads=2,random-heads=3

# measure NAME COMMAND...: a report as text and as JSON of one run
measure() {
    name=$1
    shift
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "docs/quality/$name.md"
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "docs/quality/$name.json"
}

for book in "$texts"/*.txt; do
    measure perplexity perplexity "$book" "$model" -c 8k --policies $policies \
        --plot docs/quality/perplexity.png
    python models/compression_study.py "$book" "$model" -c 4k --slices 12 --samples 2 \
        -o docs/quality/compression.json > docs/quality/compression.md
    python models/compression_study.py "$book" "$model" -c 2k --slices 8 --samples 3 --ablation \
        -o docs/quality/ablation.json > docs/quality/ablation.md
done
measure needle needle "$model" -c 2k,4k,8k --haystack "$texts" --policies $policies \
    --plot docs/quality/needle.png
measure needle-made-text needle "$model" -c 8k --policies full,razor,razor-q8_0
measure budget needle "$model" -c 8k --haystack "$texts" --kinds single,keys --samples 4 \
    --policies full,full-q8_0,full-q4_0,razor,razor-q8_0,local \
    --budget 0.05,0.1,0.15,0.2,0.3 --plot-curve docs/quality/budget.png
measure ruler ruler "$model" -c 4k --policies $policies
