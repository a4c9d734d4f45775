#!/bin/sh
# Makes all that docs/quality/ holds, and docs/quality.md of it:
#
#   sh models/evaluate.sh TEXTS JOURNALS [MODEL.gguf]
#
# TEXTS: folder with the text that was held out in training, and no other. JOURNALS: folder for what
# is finished; the same command goes on from there. MODEL: the built-in one if none is named.
# Takes hours on two cores.
set -eu
texts=$(realpath "$1") journals=$(realpath "$2")
model=${3:+$(realpath "$3")}
cd "$(dirname "$0")/.."
model=${model:-razor_local/data/razor-default.gguf}
mkdir -p "$journals" docs/quality
heads=random-heads=1,random-heads=2,random-heads=3
all=full,full-q8_0,full-q4_0,razor,razor-q8_0,razor-q4_0,razor-no-comp,local,streaming,$heads

# measure NAME COMMAND...: a report as text and as JSON of one run
measure() {
    name=$1
    shift
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "docs/quality/$name.md"
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "docs/quality/$name.json"
}

book=$(ls "$texts"/*.txt)
python models/compression_study.py "$book" "$model" -c 2k --slices 8 --samples 3 --ablation \
    -o docs/quality/ablation.json > docs/quality/ablation.md
measure needle needle "$model" -c 2k,4k,8k --haystack "$texts" --samples 5 --policies $all \
    --plot docs/quality/needle.png
measure ruler ruler "$model" -c 4k,8k --haystack "$texts" --samples 10 --policies $all
measure perplexity perplexity "$book" "$model" -c 8k --policies $all \
    --plot docs/quality/perplexity.png
measure budget needle "$model" -c 8k --haystack "$texts" --kinds single,keys --samples 4 \
    --policies full,full-q8_0,full-q4_0,razor,razor-q8_0,local \
    --budget 0.05,0.1,0.15,0.2,0.3 --plot-curve docs/quality/budget.png
python models/compression_study.py "$book" "$model" -c 4k --slices 12 --samples 2 \
    -o docs/quality/compression.json > docs/quality/compression.md
python models/quality_doc.py
